"""Transports chosen and recorded, on every rank of a group."""

import numpy as np
import torch.distributed as dist
from recording_transport import RecordingTransport
from toy_training import Case, ToyModel, loss_sum, make_batch, make_plan, model_input, start

from relibra_kernels.parallel import ExpertParallel, RoutedBatch, RuntimeOptions
from relibra_kernels.planner import ClusterSpec, ReLibraError


def transports_that_differ() -> str:
    """The error where the last rank wants another transport than the others."""
    case = Case(ranks=4, gpus_per_node=2)
    wanted = "two" if dist.get_rank() == case.ranks - 1 else "auto"
    try:
        ExpertParallel(ToyModel(case), ClusterSpec(2, 2), options=RuntimeOptions(transport=wanted))
    except ReLibraError as error:
        return str(error)
    return "no error"


def forwards_under_a_recorder(case: Case, only_name: bool = False) -> list[tuple[str, str, int]] | str:
    """What one micro-batch, forward and backward, asks of the transport; or the transport's name alone."""
    ep, optimizer = start(case)
    if only_name:
        return ep._transport.name
    recorder = ep._transport = RecordingTransport(ep._transport)
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    batch = RoutedBatch(trace.select(mine), groups[mine], case.micro_batches)
    plan = make_plan(case, ep, batch, 0)
    ids, rows, counted = model_input(case, batch.trace, tokens, mine, batch.sequences(0))
    with ep.batch(plan, batch, optimizer), ep.micro_batch(0, rows):
        loss_sum(ep.model(ids), ids, counted).backward()
    return recorder.calls
