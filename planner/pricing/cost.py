"""What a batch costs under a policy: a model, not a measurement. Seconds, for one optimizer step.

For every (layer, micro-batch) the step takes, one after the other,
  dense        attention and shared experts, forward and backward; the same for every policy
  experts      the busiest rank's grouped GEMMs, rows rounded up to tiles, forward and backward
  all-to-all   dispatch and combine, forward and backward, for the rank that gets most; a token travels to a rank once
  replicas     weights pushed before forward and, unless they are kept, again before backward, gradients returned
               after it: what of that outlasts the dense part behind which it is hidden
and once for the batch
  kept         guests: weights in, gradients out, as far as this outlasts one micro-batch's dense part of that layer
  migration    experts that change their owner, with optimizer state; hidden behind nothing
Planning is not in the sum: as in the paper, it runs while the last rollouts finish. It is reported beside it.

Where tokens come from is unknown in a table without sources. Then rows are *estimated*: sources are alike, and a token
chooses its ranks independently in proportion to their loads, so that with top-k K a rank that has the fraction f of all
assignments gets a row of 1 - (1 - f) ** K of the tokens.
"""

from dataclasses import dataclass, fields

import numpy as np

from .devices import DeviceSpec
from .models import ModelShape
from .outcome import Outcome

_TILE = 128  # rows of a GEMM tile: each slot computes whole tiles


@dataclass(frozen=True)
class Cost:
    """Seconds of one optimizer step, by what they are spent on; and bytes per layer and micro-batch."""

    dense: float
    experts: float
    all_to_all: float
    replicas: float
    kept: float
    migration: float
    bytes_fast: float
    bytes_slow: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, field.name) for field in fields(Cost) if not field.name.startswith("bytes"))


def price(
    outcome: Outcome,
    model: ModelShape,
    device: DeviceSpec,
    gpus_per_node: int,
    sequence_length: int,
    rows_LMRR: np.ndarray | None = None,
    *,
    keep_replicas: bool = False,
) -> Cost:
    """The cost of a batch.

    Args:
        rows_LMRR: distinct rows from each source rank to each rank, where the trace is known.
        keep_replicas: replicas stay from forward to backward instead of being pushed again.
    """
    ranks = outcome.pushed_in.shape[2]
    tokens = outcome.rank_load.sum(2) / model.top_k  # [L, M] over all ranks
    dense = 3 * tokens / ranks * model.dense_flops(sequence_length) / device.dense_flops  # backward is twice forward
    tiles = -(-outcome.slot_load // _TILE)
    experts = 3 * (tiles.sum(3).max(2) * _TILE) * model.assignment_flops() / device.grouped_flops

    fast_rows, slow_rows = _rows(outcome, model.top_k, gpus_per_node, rows_LMRR)
    row_bytes = 2 * model.hidden_size
    exchange = np.maximum(fast_rows * row_bytes / device.fast, slow_rows * row_bytes / device.slow)

    near = np.maximum(outcome.pushed_in, outcome.pushed_out).max(2) / device.fast
    far = np.maximum(outcome.far_in, outcome.far_out).max(2) / device.slow
    push = np.maximum(near, far) * model.expert_bytes
    back = np.maximum(near, far) * ((0 if keep_replicas else model.expert_bytes) + model.gradient_bytes)
    exposed = np.maximum(push - dense / 3, 0) + np.maximum(back - dense * 2 / 3, 0)

    kept = np.maximum(outcome.kept_in, outcome.kept_out).max(1) / device.slow
    window = dense.mean(1)
    kept_exposed = np.maximum(kept * model.expert_bytes - window / 3, 0)
    kept_exposed += np.maximum(kept * model.gradient_bytes - window * 2 / 3, 0)
    moved = np.maximum(outcome.moved_in.sum(0), outcome.moved_out.sum(0)).max() * model.migration_bytes / device.slow

    bytes_fast, bytes_slow = replica_bytes(outcome, model, keep_replicas=keep_replicas)
    return Cost(
        dense=float(dense.sum()),
        experts=float(experts.sum()),
        all_to_all=float(4 * exchange.sum()),
        replicas=float(exposed.sum()),
        kept=float(kept_exposed.sum()),
        migration=float(moved),
        bytes_fast=bytes_fast,
        bytes_slow=bytes_slow,
    )


def replica_bytes(outcome: Outcome, model: ModelShape, *, keep_replicas: bool = False) -> tuple[float, float]:
    """Bytes per layer and micro-batch inside nodes, and between them, for replicas, guests and migration.

    A replica's weights travel twice (forward, backward), or once where it is kept in between, and its gradient once; a
    guest's once each in a batch.
    """
    trip = (1 if keep_replicas else 2) * model.expert_bytes + model.gradient_bytes
    once = outcome.kept_in.sum() * (model.expert_bytes + model.gradient_bytes)
    once += outcome.moved_in.sum() * model.migration_bytes
    pairs = outcome.pushed_in.shape[0] * outcome.pushed_in.shape[1]
    return float(outcome.pushed_in.sum() * trip / pairs), float((outcome.far_in.sum() * trip + once) / pairs)


def break_even(model: ModelShape, device: DeviceSpec, tokens_per_rank: float, sequence_length: int) -> int:
    """Assignments below which a replica in the node costs more time than it saves.

    Each assignment moved saves the busiest rank its FLOPs. The weights cost what of their way there, and of their
    gradient's way back, the dense part of a micro-batch does not hide, plus one tile that rounding may add.
    """
    dense = tokens_per_rank * model.dense_flops(sequence_length) / device.dense_flops
    exposed = max(model.expert_bytes / device.fast - dense, 0.0)
    exposed += max((model.expert_bytes + model.gradient_bytes) / device.fast - 2 * dense, 0.0)
    return 1 + int(exposed * device.grouped_flops / (3 * model.assignment_flops()))


def distinct_rows(destination_TK: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [R]: how many of one source's tokens go to each rank, each counted once (`destinations` gives these)."""
    seen = np.zeros((len(destination_TK), ranks), np.bool_)
    token, choice = np.nonzero(destination_TK >= 0)
    seen[token, destination_TK[token, choice]] = True
    return seen.sum(0)


def _rows(
    outcome: Outcome, top_k: int, gpus_per_node: int, rows_LMRR: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """[L, M] twice: rows that the worst rank sends or gets inside its node, and between nodes."""
    ranks = outcome.rank_load.shape[2]
    node = np.arange(ranks) // gpus_per_node
    if rows_LMRR is not None:
        same = node[:, None] == node
        near = rows_LMRR * (same & ~np.eye(ranks, dtype=bool))
        far = rows_LMRR * ~same
        worst = [np.maximum(part.sum(3).max(2), part.sum(2).max(2)) for part in (near, far)]
        return worst[0], worst[1]
    load = outcome.rank_load
    total = np.maximum(load.sum(2, keepdims=True), 1)
    received = total / top_k * (1 - (1 - load / total) ** top_k)
    most = np.maximum(received.max(2), received.mean(2))
    return most * (gpus_per_node - 1) / ranks, most * (ranks - gpus_per_node) / ranks
