"""Batches whose record is of other tokens, other layers or another model, run on every rank of a group."""

import numpy as np
import torch
import torch.distributed as dist
from toy_training import Case, ToyModel, loss_sum

from relibra_kernels.parallel import ExpertParallel, RoutedBatch, RuntimeOptions
from relibra_kernels.planner import ClusterSpec, ReLibraError, RoutingTrace

EVERY = -1


def shifted(ids_TLK: np.ndarray, record: str, wrong: float = 1.0) -> np.ndarray:
    """The first `wrong` of the tokens have what belongs to another token or layer."""
    by = -1 if record.endswith("early") else 1
    axis = {"token": 0, "layer": 1}.get(record.removesuffix(" early"))
    other = ids_TLK if axis is None else np.roll(ids_TLK, by, axis)
    few = int(wrong * len(ids_TLK))
    return np.concatenate([other[:few], ids_TLK[few:]])


def shift_of(
    record: str,
    on_shift: str | None,
    *,
    wrong_rank: int = EVERY,
    wrong: float = 1.0,
    length: int = 40,
    micro_batches: int = 2,
    **changes,
) -> tuple[str, str, float | None, int]:
    """(error's kind, its message, the share of the statistics, micro-batches that were run) of one batch."""
    case = Case(micro_batches=micro_batches, **changes)
    rank = dist.get_rank()
    options = RuntimeOptions(on_shift=on_shift)
    ep = ExpertParallel(ToyModel(case), ClusterSpec(1, case.ranks, 1), options=options)
    random = torch.Generator().manual_seed(rank)
    inputs = [torch.randint(0, 32, (length,), generator=random) for _ in range(micro_batches)]
    with torch.no_grad(), ep.record() as seen:
        for ids in inputs:
            ep.model(ids)
    trace = seen.routed_batch().trace
    if record == "model" and wrong_rank in (EVERY, rank):
        other = ToyModel(Case(seed=7, **changes))
        with torch.no_grad():
            logits = [other.moe[0].router(other.embedding(ids))[2] for ids in inputs]
        chosen = torch.cat(logits)[:, None].expand(-1, case.layers, -1)
        trace = RoutingTrace(chosen.to(torch.int16).numpy(), trace.offsets, case.experts, trace.moe_layer_ids)
    elif wrong_rank in (EVERY, rank):
        ids_TLK = shifted(trace.expert_ids, record, wrong)
        trace = RoutingTrace(ids_TLK, trace.offsets, case.experts, trace.moe_layer_ids)
    batch, done = RoutedBatch(trace, np.arange(micro_batches), micro_batches), 0
    kind = message = ""
    try:
        with ep.batch(ep.plan(batch), batch, None):
            for m, ids in enumerate(inputs):
                with ep.micro_batch(m):
                    loss_sum(ep.model(ids), ids, torch.ones(length, dtype=torch.bool)).backward()
                    done += 1
    except ReLibraError as error:
        kind, message = type(error).__name__, str(error)
    return kind, message, ep.stats().agreeing_share, done
