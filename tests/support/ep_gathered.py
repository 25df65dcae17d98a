"""Experts gathered in logical order on every rank of a group: which, and with how much memory."""

import weakref

import torch
import torch.distributed as dist
from ep_pretrained import move
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import Case, ToyModel

from relibra_kernels.parallel import ExpertParallel
from relibra_kernels.parallel.comm.collectives import TOLD_TO_EACH, Comm
from relibra_kernels.planner import ClusterSpec, InputError


class PeakMemory(TorchDispatchMode):
    """Within, the most bytes that tensors made here have held at one time, after any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            storage = made.untyped_storage()
            self._alive[id(made)] = weakref.ref(made), storage.data_ptr(), storage.nbytes()
        alive = {key: kept for key, kept in self._alive.items() if kept[0]() is not None}
        self._alive = alive
        self.peak = max(self.peak, sum({place: size for _, place, size in alive.values()}.values()))
        return made


def moved(experts: int) -> tuple[ExpertParallel, ToyModel]:
    """A model whose experts have moved, and the same in one process."""
    case = Case(ranks=dist.get_world_size(), experts=experts)
    cluster = ClusterSpec(1, case.ranks)
    ep, alone = ExpertParallel(ToyModel(case), cluster), ToyModel(case)
    assert move(ep, cluster) > 0
    return ep, alone


def gathered_in_parts(experts: int) -> bool:
    """Whether experts that are gathered some slots at a time are those of one process."""
    ep, alone = moved(experts)
    return all(torch.equal(value, alone.get_parameter(name)) for name, value in ep.named_logical_parameters())


def gathered_tensors() -> list[bool]:
    """Whether a small tensor and a large one of every rank are stacked."""
    comm, right = Comm(None, 1), []
    for size in (3, TOLD_TO_EACH):
        local = torch.arange(size) + comm.rank
        everyone = torch.stack([torch.arange(size) + rank for rank in range(comm.size)])
        right.append(torch.equal(comm.gather_tensors(local, "a test"), everyone))
    return right


def memory_to_gather(experts: int) -> float:
    """On one rank, the most memory that gathering all parameters takes, over that of the largest, where each is let go
    of. Rows are copied in place of gloo's exchange, whose threads let go of their tensors some time later.
    """
    ep = ExpertParallel(ToyModel(Case(ranks=1, experts=experts)), ClusterSpec(1, 1))
    ep.comm.gather_tensors = lambda local, phase: local[None].clone()
    largest = max(parameter.nbytes for parameter in ep.model.parameters())
    with PeakMemory() as memory:
        for _, tensor in ep.named_logical_parameters():
            del tensor
    return memory.peak / largest


def gathered_by_name(names: list[str]) -> tuple[list[str], bool, int, str]:
    """(names that came, whether their values are right, collectives that ran, what is said of an unknown name)."""
    ep, alone = moved(8)
    before = ep.comm.position[0]
    found = dict(ep.named_logical_parameters(names=names))
    right = all(torch.equal(value, alone.get_parameter(name)) for name, value in found.items())
    count = ep.comm.position[0] - before
    try:
        ep.named_logical_parameters(names=["moe.9.experts.down_proj"])
    except InputError as error:
        return list(found), right, count, str(error)
    return list(found), right, count, ""
