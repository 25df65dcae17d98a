"""What a batch costs under a policy: a model, not a measurement. Seconds, for one optimizer step.

For every (layer, micro-batch) the step takes, one after the other,
  fixed        host and device work that nothing changes
  dense        attention and shared experts, forward and backward
  experts      the busiest rank's grouped GEMMs. A slot's rows are rounded up to whole tiles. Forward and the input's
               gradient each take at least the time in which memory reads the slot's bf16 weights, the weights' gradient
               the time in which memory reads and writes the fp32 sums
  exchange     four all-to-alls at the busiest link, with a price for each launch. A token travels to a rank once (one
               hop) or to a node once and then inside it (two hops)
  fetched      fetched replicas, which are sent while the dense part computes. Three things count: the time that they
               take longer than it, `contention` of the rest (a transfer slows the compute beside it), and launches
and once for the batch
  kept         kept replicas: weights go once to every node and are handed on there; gradients are added up in the
               node and sent home. Priced like fetched ones, hidden behind the dense part of one micro-batch
  migration    experts that change their home, with optimizer state; hidden behind nothing

Rows of tokens that travel are *estimated* from loads. The estimate takes all ranks to send alike, and a token to choose
each of its ranks independently, in proportion to what they compute for its node.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from .devices import DeviceSpec
from .models import ModelShape
from .outcome import Outcome

EXCHANGES = 4  # of tokens in a layer and micro-batch: dispatch and combine, forward and backward
_TILE = 128  # rows of a GEMM tile: each slot computes whole tiles


@dataclass(frozen=True)
class Setting:
    """What a batch is priced for.

    model, device:   sizes and achieved rates
    gpus_per_node:   ranks a node of the expert-parallel group
    sequence_length: tokens of a sequence, for attention
    transport:       "one" or "two" hops between nodes, or "auto", the cheaper of them in each layer and micro-batch
    keep_replicas:   fetched replicas stay from forward to backward instead of being sent again
    """

    model: ModelShape
    device: DeviceSpec
    gpus_per_node: int
    sequence_length: int = 4096
    transport: str = "one"
    keep_replicas: bool = False


@dataclass(frozen=True)
class Cost:
    """Modelled seconds of one optimizer step, all layers and micro-batches together; `seconds` is their sum.

    fixed:      host and device work that nothing changes. dense: attention and shared experts
    experts:    grouped GEMMs of the busiest ranks. exchange: all-to-alls of tokens
    fetched, kept: what replicas take that is not hidden. migration: experts that change their home
    bytes_fast, bytes_slow: bytes of replicas and migration inside nodes and between them, all ranks together, a layer
                and micro-batch
    """

    fixed: float
    dense: float
    experts: float
    exchange: float
    fetched: float
    kept: float
    migration: float
    bytes_fast: float
    bytes_slow: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, field.name) for field in fields(Cost) if not field.name.startswith("bytes"))


def price(outcome: Outcome, setting: Setting) -> Cost:
    """The cost of a batch. Planning is taken to be hidden behind the rollout."""
    parts = seconds_by_pair(outcome, setting)
    bytes_fast, bytes_slow = replica_bytes(outcome, setting.model, keep_replicas=setting.keep_replicas)
    return Cost(
        **{name: float(part.sum()) for name, part in parts.items()},
        kept=float(kept_seconds(outcome, setting).sum()),
        migration=migration_seconds(outcome, setting),
        bytes_fast=bytes_fast,
        bytes_slow=bytes_slow,
    )


def seconds_by_pair(outcome: Outcome, setting: Setting) -> dict[str, np.ndarray]:
    """Seconds [L, M] of every layer and micro-batch, by part: fixed, dense, experts, exchange, fetched."""
    dense = _dense(outcome, setting)
    return {
        "fixed": np.where(dense > 0, setting.device.layer_seconds, 0.0),
        "dense": dense,
        "experts": _slot_seconds(outcome.slot_load, setting).sum(3).max(2),
        "exchange": exchange(outcome, setting).seconds,
        "fetched": _fetched(outcome, setting, dense),
    }


def kept_seconds(outcome: Outcome, setting: Setting) -> np.ndarray:
    """Seconds [L] that the kept replicas of every layer take, once a batch."""
    model, device = setting.model, setting.device
    far = np.maximum(outcome.kept_in, outcome.kept_out).max(1) / device.slow
    near = np.maximum(outcome.kept_near_in, outcome.kept_near_out).max(1) / device.fast
    once = np.maximum(far, near)  # of one byte a replica
    window = _dense(outcome, setting).mean(1)
    return _hidden(once * model.expert_bytes, window / 3, device) + _hidden(
        once * model.gradient_bytes, window * 2 / 3, device
    )


def migration_seconds(outcome: Outcome, setting: Setting) -> float:
    """Seconds that moving homes takes: those of the rank that gets or gives most experts over all layers."""
    moves = np.maximum(outcome.moved_in.sum(0), outcome.moved_out.sum(0)).max()
    return float(moves * move_seconds(setting, outcome.moved_in.shape[1]))


def move_seconds(setting: Setting, ranks: int) -> float:
    """What one expert's way to another home takes: between nodes, where there are several."""
    device = setting.device
    bandwidth = device.fast if ranks == setting.gpus_per_node else device.slow
    return setting.model.migration_bytes / bandwidth + device.transfer_launch


def _dense(outcome: Outcome, setting: Setting) -> np.ndarray:
    ranks = outcome.slot_load.shape[2]
    tokens = outcome.slot_load.sum((2, 3)) / setting.model.top_k / ranks
    return 3 * tokens * setting.model.dense_flops(setting.sequence_length) / setting.device.dense_flops


def _slot_seconds(slot_load: np.ndarray, setting: Setting) -> np.ndarray:
    """Forward, gradient of the input and of the weights, each of the grouped GEMMs of one slot."""
    model, device = setting.model, setting.device
    rows = -(-slot_load // _TILE) * _TILE
    compute = rows * (model.assignment_flops() / device.grouped_flops)
    sums = rows * (model.update_flops() / device.grouped_flops)
    weights, update = model.expert_bytes / device.hbm, 8 * model.trained_parameters / device.hbm
    seconds = 2 * np.maximum(compute, weights) + np.maximum(sums, update)
    return np.where(slot_load > 0, seconds + device.slot_seconds, 0.0)


def _hidden(transfer: np.ndarray, window: np.ndarray, device: DeviceSpec) -> np.ndarray:
    """What a transfer beside compute costs: what outlasts it, a part of the rest, and its launch."""
    exposed = np.maximum(transfer - window, 0)
    return np.where(transfer > 0, exposed + device.contention * (transfer - exposed) + device.transfer_launch, 0.0)


def _fetched(outcome: Outcome, setting: Setting, dense: np.ndarray) -> np.ndarray:
    model, device = setting.model, setting.device
    near = np.maximum(outcome.pushed_in, outcome.pushed_out).max(2) / device.fast
    far = np.maximum(outcome.far_in, outcome.far_out).max(2) / device.slow
    once = np.maximum(near, far)
    again = 0 if setting.keep_replicas else model.expert_bytes
    launches = np.where(once > 0, device.transfer_launch if again else 0.0, 0.0)
    return (
        _hidden(once * model.expert_bytes, dense / 3, device)
        + _hidden(once * (again + model.gradient_bytes), dense * 2 / 3, device)
        + launches
    )


class ExchangeCost(NamedTuple):
    """[L, M] of the four exchanges of tokens: seconds, and rows of the busiest rank inside its node and between."""

    seconds: np.ndarray
    near_rows: np.ndarray
    far_rows: np.ndarray


def exchange(outcome: Outcome, setting: Setting) -> ExchangeCost:
    """What the exchanges of tokens take; rows are those of one of the four."""
    if setting.transport != "auto":
        return _hops(outcome, setting, setting.transport)
    one, two = (_hops(outcome, setting, way) for way in ("one", "two"))
    pairs = zip(one, two, strict=True)
    return ExchangeCost(*(np.where(one.seconds <= two.seconds, of_one, of_two) for of_one, of_two in pairs))


def _hops(outcome: Outcome, setting: Setting, way: str) -> ExchangeCost:
    ranks, device = outcome.slot_load.shape[2], setting.device
    near, far = _estimated_rows(outcome, setting, way)
    row_bytes = 2 * setting.model.hidden_size
    launch = device.launch_fast if ranks == setting.gpus_per_node else device.launch_slow
    if way == "two" and ranks > setting.gpus_per_node:
        launch += device.launch_fast
    busy = np.maximum(near * row_bytes / device.fast, far * row_bytes / device.slow)
    moves = ((near > 0) | (far > 0)) & (ranks > 1)
    return ExchangeCost(np.where(moves, EXCHANGES * (busy + launch), 0.0), near, far)


def _estimated_rows(outcome: Outcome, setting: Setting, way: str) -> tuple[np.ndarray, np.ndarray]:
    """[L, M] twice: rows that the busiest rank sends or gets inside its node, and between nodes.

    Estimated from what ranks compute for their own node and for others.
    """
    gpus, top_k = setting.gpus_per_node, setting.model.top_k
    load = outcome.slot_load.sum(3).astype(np.float64)
    layers, micro_batches, ranks = load.shape
    nodes = ranks // gpus
    total = np.maximum(load.sum(2, keepdims=True), 1.0)
    tokens = total / top_k
    local = load / nodes if outcome.local is None else outcome.local
    inside = tokens / nodes * (1 - _power(1 - np.minimum(local / (total / nodes), 1.0), top_k)) * ((gpus - 1) / gpus)
    if nodes == 1:
        return inside.max(2), np.zeros((layers, micro_batches))
    away = (load - local).reshape(layers, micro_batches, nodes, gpus)
    others = total * ((nodes - 1) / nodes)
    # What arrives: at each rank from other nodes or, with two hops, at each node once, shared by its ranks.
    if way == "one":
        arriving = tokens[..., None] * ((nodes - 1) / nodes) * (1 - _power(1 - away / others[..., None], top_k))
        near = inside.max(2)
    else:
        there = away.sum(3)
        once = tokens * ((nodes - 1) / nodes) * (1 - _power(1 - there / others, top_k))
        arriving = np.broadcast_to((once / gpus)[..., None], away.shape)
        handed = tokens[..., None] * ((nodes - 1) / nodes) * (1 - _power(1 - away / others[..., None], top_k))
        near = (inside.reshape(away.shape) + handed * ((gpus - 1) / gpus)).max((2, 3))
    # What leaves a node: what its tokens want and its ranks do not compute, at the rows an assignment takes on average.
    rows_each = arriving.sum((2, 3)) / np.maximum(away.sum((2, 3)), 1e-9)
    leaving = total[..., 0, None] / nodes - local.reshape(layers, micro_batches, nodes, gpus).sum(3)
    return near, np.maximum(arriving.max((2, 3)), leaving.max(2) / gpus * rows_each)


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    """base ** exponent by multiplication, whose bits are the same on every machine."""
    out, square = np.ones_like(base), base
    while exponent:
        if exponent & 1:
            out = out * square
        square, exponent = square * square, exponent >> 1
    return out


def replica_bytes(outcome: Outcome, model: ModelShape, *, keep_replicas: bool = False) -> tuple[float, float]:
    """Bytes per layer and micro-batch inside nodes, and between them, for fetched and kept replicas and migration.

    A fetched replica's weights travel twice (forward, backward), or once where it stays in between, and its gradient
    once; a kept one's once each in a batch. Migration counts as between nodes.
    """
    pairs = outcome.pushed_in.shape[0] * outcome.pushed_in.shape[1]
    sent = bytes_of_ranks(outcome, model, keep_replicas=keep_replicas)
    fast = sent["fetched_fast"] + sent["kept_fast"]
    slow = sent["fetched_slow"] + sent["kept_slow"] + sent["migration"]
    return float(fast.sum() / pairs), float(slow.sum() / pairs)


def bytes_of_ranks(
    outcome: Outcome, model: ModelShape, direction: str = "in", *, keep_replicas: bool = False
) -> dict[str, np.ndarray]:
    """int64 [R] by kind and network: what the replicas and moves that come to a rank cost over the batch.

    Args:
        direction: "in", or "out" for those that leave it. Gradients, which travel the other way, count with weights.
    """
    once = model.expert_bytes + model.gradient_bytes
    fetched = once if keep_replicas else once + model.expert_bytes
    each = {
        "fetched_fast": ("pushed", fetched),
        "fetched_slow": ("far", fetched),
        "kept_fast": ("kept_near", once),
        "kept_slow": ("kept", once),
        "migration": ("moved", model.migration_bytes),
    }
    counts = {kind: getattr(outcome, f"{name}_{direction}") for kind, (name, _) in each.items()}
    return {kind: n.reshape(-1, n.shape[-1]).sum(0) * each[kind][1] for kind, n in counts.items()}
