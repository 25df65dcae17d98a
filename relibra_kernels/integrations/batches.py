"""From a trainer's batch to a plan: what is common to verl, slime and others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..planner import BatchPlan, ClusterSpec, RoutingTrace, load_table, plan_batch
from ..planner.errors import InputError


@dataclass(frozen=True)
class PlannedBatch:
    """A plan, and what each rank needs to train under it.

    loads: int32 [L, M, R, E], the table by source rank that the plan is for
    """

    plan: BatchPlan
    trace: RoutingTrace
    loads: np.ndarray
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    def of_rank(self, rank: int) -> tuple[RoutingTrace, np.ndarray]:
        """(trace of this rank's sequences as it trains on them, micro-batch of each): for `ExpertParallel`."""
        parts = self.micro_batches[rank]
        sequences = [sequence for part in parts for sequence in part]
        groups = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return self.trace.select(sequences), groups


def plan_micro_batches(
    trace: RoutingTrace,
    micro_batches: Sequence[Sequence[Sequence[int]]],
    cluster: ClusterSpec,
    *,
    previous_home: np.ndarray | None = None,
    model: str = "",
) -> PlannedBatch:
    """Plan a batch whose sequences are dealt out already. The same everywhere: call it on every rank, or on one.

    Args:
        micro_batches: `micro_batches[rank][m]` are the sequences of the trace that the rank trains on in micro-batch m.
        previous_home: int [L, E], `plan.home` of the batch before.

    Raises: InputError where ranks have different numbers of micro-batches, or a sequence is dealt out twice or never.
    """
    dealt = tuple(tuple(tuple(int(i) for i in part) for part in parts) for parts in micro_batches)
    if len(dealt) != cluster.num_ranks:
        raise InputError(f"micro_batches are for {len(dealt)} ranks, but the cluster has {cluster.num_ranks}")
    counts = {len(parts) for parts in dealt}
    if len(counts) > 1 or 0 in counts:
        raise InputError(f"ranks have {sorted(counts)} micro-batches; all must have the same number, at least one")
    micro_batch, rank = np.full(trace.num_sequences, -1), np.full(trace.num_sequences, -1)
    for r, parts in enumerate(dealt):
        for m, part in enumerate(parts):
            for sequence in part:
                if not 0 <= sequence < trace.num_sequences or rank[sequence] >= 0:
                    raise InputError(
                        f"micro_batches[{r}][{m}] has sequence {sequence}, which must be one of "
                        f"0..{trace.num_sequences - 1} that no other micro-batch has"
                    )
                micro_batch[sequence], rank[sequence] = m, r
    if (rank < 0).any():
        raise InputError(f"micro_batches leave out sequence {int(np.argmax(rank < 0))}")
    loads = load_table(trace, micro_batch, rank, counts.pop(), cluster.num_ranks)
    return PlannedBatch(plan_batch(loads, cluster, previous_home=previous_home, model=model), trace, loads, dealt)


def even_micro_batches(num_sequences: int, num_ranks: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Consecutive sequences to each rank, and on it to each micro-batch, as a data-parallel chunk does."""
    if num_sequences % num_ranks or (num_sequences // num_ranks) % micro_batch_size:
        raise InputError(
            f"{num_sequences} sequences do not divide over {num_ranks} ranks in micro-batches of {micro_batch_size}"
        )
    each = num_sequences // num_ranks
    return [
        [list(range(start, start + micro_batch_size)) for start in range(r * each, (r + 1) * each, micro_batch_size)]
        for r in range(num_ranks)
    ]


def to_numpy(value: Any) -> np.ndarray:
    """A tensor or array, on the host."""
    return value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
