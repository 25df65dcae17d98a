"""Collectives and host-blocking calls inside the layers of a recorded micro-batch, on every rank of a group."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import Case, loss_sum, make_batch, make_plan, model_input, start

from relibra_kernels.parallel import RoutedBatch

COLLECTIVES = ("all_to_all_single", "all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "barrier")
BLOCKING = ("item", "cpu", "tolist", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")


def count_in_layers(case: Case) -> tuple[Counter[str], Counter[str], int, int]:
    """(collectives by name, host-blocking calls by place, layers that ran forward and backward, replicas fetched)."""
    ep, optimizer = start(case)
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    batch = RoutedBatch(trace.select(mine), groups[mine], case.micro_batches)
    plan = make_plan(case, ep, batch, 0)
    inputs = [model_input(case, batch.trace, tokens, mine, batch.sequences(m)) for m in range(case.micro_batches)]
    collectives, blocking, runs = Counter(), Counter(), 0
    with counted(collectives, blocking) as inside, ep.batch(plan, batch, optimizer):
        for m, (ids, rows, count_T) in enumerate(inputs):
            with ep.micro_batch(m, rows), inside:
                loss_sum(ep.model(ids), ids, count_T).backward()
            runs += case.layers
    fetched = int(((plan.replicas >= 0) & ~(ep._last._kept.kept_LRS[:, None])).sum())
    return collectives, blocking, runs, fetched


@contextmanager
def counted(collectives: Counter[str], blocking: Counter[str]) -> Iterator["Inside"]:
    """Count what is called while `Inside` is entered: collectives, and blocking calls by the runtime's own code."""
    inside = Inside()
    with ExitStack() as stack:
        for owner, names in ((dist, COLLECTIVES), (torch.Tensor, BLOCKING)):
            for name in names:
                original = getattr(owner, name)
                counting = _counting(original, name, inside, collectives if owner is dist else blocking, owner is dist)
                setattr(owner, name, counting)
                stack.callback(setattr, owner, name, original)
        yield inside


def groups_connected_by_the_constructor(case: Case) -> tuple[int, bool]:
    """(process groups over which something will travel, whether all of them have exchanged something by then)."""
    connected, exchange = set(), dist.all_to_all_single

    def noted(*args, group=None, **kwargs):
        connected.add(group)
        return exchange(*args, group=group, **kwargs)

    dist.all_to_all_single = noted
    try:
        ep, _ = start(case)
    finally:
        dist.all_to_all_single = exchange
    groups = {comm.group for comm in ep.groups.every}
    return len(groups), groups <= connected


class OperatorsThatLaunch(TorchDispatchMode):
    """Within, torch's operators are counted, but for those that only make views or memory."""

    SILENT = frozenset(
        (
            *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes"),
            *("squeeze", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
            *("empty", "new_empty"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        on_host = isinstance(made, torch.Tensor) and made.device.type == "cpu"  # numbers that operators take
        self.launches += not on_host and operator.overloadpacket.__name__ not in self.SILENT
        return made


class Inside:
    """Whether calls are counted now."""

    now = False

    def __enter__(self) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        self.now = False


def _counting(original, name, inside: Inside, counter: Counter[str], anywhere: bool):
    def call(*args, **kwargs):
        if inside.now:
            where = sys._getframe(1).f_code.co_filename
            if anywhere:
                counter[name] += 1
            elif "relibra_kernels/parallel" in where:
                counter[f"{name} in {where.rpartition('/')[2]}"] += 1
        return original(*args, **kwargs)

    return call


def blocking_calls_are_seen() -> Counter[str]:
    """What is counted where the runtime's code does read a device: a live layer's counts."""
    case = Case(unrecorded=0.3)
    return count_in_layers(case)[1]
