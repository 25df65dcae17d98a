"""What a batch takes from its buffers, on every rank of a group."""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from toy_training import Case, loss_sum, make_batch, make_plan, model_input, start

from relibra_kernels.parallel import RoutedBatch
from relibra_kernels.parallel.tokens.buffers import Rows, Shape


def buffers_of_batch(case: Case) -> tuple[list[bool], dict[str, int], dict[str, int]]:
    """(whether the layers of each pass found their memory there, bytes by name, bytes taken at most).

    A micro-batch is passed in inference mode first, then trained on.
    """
    ep, optimizer = start(case)
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    trace, groups = trace.select(mine), groups[mine]
    plan = make_plan(case, ep, RoutedBatch(trace, groups, case.micro_batches), 0)
    buffers, most = ep._transport.buffers, Counter()
    take = buffers.take

    def recorded(name: str, device: torch.device, shape: Shape) -> Rows:
        rows = shape.come + shape.stay + shape.leave
        most[name] = max(most[name], rows * shape.width * shape.dtype.itemsize)
        return take(name, device, shape)

    buffers.take = recorded
    found = []
    with ep.batch(plan, trace, groups, optimizer):
        for m in range(case.micro_batches):
            ids, rows, counted = model_input(case, trace, tokens, mine, np.flatnonzero(groups == m))
            for training in (False, True):
                with nullcontext() if training else torch.inference_mode(), ep.micro_batch(m, rows):
                    before = dict(buffers.memory)
                    loss = loss_sum(ep.model(ids), ids, counted)
                    if training:
                        loss.backward()
                    same = [buffers.memory[key] is tensor for key, tensor in before.items()]
                    found.append(before.keys() == buffers.memory.keys() and all(same))
    return found, {name: len(memory) for (name, _), memory in buffers.memory.items()}, dict(most)


def views_of_forwards(live: bool) -> list[int]:
    """On one rank, how many views its buffers have after each of some forwards of other numbers of tokens."""
    case = Case(ranks=1, gpus_per_node=1, micro_batches=5, sequence_lengths=(5, 9, 3, 7, 6))
    ep, optimizer = start(case)
    trace, groups, tokens = make_batch(case, 0)
    counts, buffers = [], ep._transport.buffers
    if live:
        for ids in tokens:
            ep.model(torch.from_numpy(ids)).sum().backward()
            counts.append(len(buffers._rows))
        return counts
    with ep.batch(ep.plan(trace, groups, case.micro_batches), trace, groups, optimizer):
        for m in range(case.micro_batches):
            with ep.micro_batch(m):
                ep.model(torch.from_numpy(tokens[m])).sum().backward()
            counts.append(len(buffers._rows))
    return counts
