"""Megatron-LM: a plan as the maps that its token dispatcher needs, and a trace as the targets of `RouterReplay`.

Megatron numbers experts by place: rank r computes the columns `r * slots` to `(r + 1) * slots - 1` of the routing map.
A plan that moves or replicates experts therefore becomes a routing map whose columns are places, and a table that says
whose weights belong in each place; `slots` is E/R without replicas and E/R + S with them. Written against megatron-core
0.16.1, whose `RouterReplay` accepts too few rows and an expert twice without a word: that is refused here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..planner import RoutingTrace
from ..planner.errors import InputError, ShapeError
from .places import expert_of_place, place_of_expert, places_of_assignments

__all__ = [
    "check_config",
    "expert_of_place",
    "place_of_expert",
    "places_of_assignments",
    "replay_targets",
    "replaying",
    "rows_of_padded",
    "to_places",
]


def to_places(probs_TE: Tensor, expert_ids_TK: Tensor, places_TK: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
    """(probs, routing map) [T, num_places] for Megatron's `dispatch_preprocess`, from its router's probs by expert.

    Gradients of the probs pass through. An assignment whose place is -1 goes nowhere.
    """
    known_TK = places_TK >= 0
    probs_TK = probs_TE.gather(1, expert_ids_TK.clamp(min=0)) * known_TK
    column = torch.where(known_TK, places_TK, num_places)  # one more column takes what goes nowhere
    probs_TP = probs_TE.new_zeros(len(probs_TE), num_places + 1).scatter(1, column, probs_TK)
    map_TP = torch.zeros_like(probs_TP, dtype=torch.bool).scatter(1, column, True)
    return probs_TP[:, :num_places], map_TP[:, :num_places]


def check_config(config: Any) -> None:
    """Refuse a `TransformerConfig` under which Megatron would not replay, or would drop what is replayed."""
    for name, wanted, reason in (
        ("moe_enable_routing_replay", True, "routers have no RouterReplay otherwise"),
        ("moe_router_fusion", False, "the fused router skips RouterReplay without a word"),
        ("moe_expert_capacity_factor", None, "tokens beyond the capacity would be dropped"),
    ):
        value = getattr(config, name, wanted)
        if value != wanted:
            raise InputError(f"{name} is {value!r}, but must be {wanted!r}: {reason}")
    kind = getattr(config, "moe_router_load_balancing_type", "none")
    if kind == "sinkhorn":
        raise InputError("moe_router_load_balancing_type is 'sinkhorn', which does not go through RouterReplay")


def replay_targets(
    trace: RoutingTrace,
    *,
    rows: np.ndarray | None = None,
    first_expert: int = 0,
    layers: Sequence[int] | None = None,
) -> list[Tensor]:
    """int64 [tokens fed, K] for each router of this pipeline stage, for `RouterReplay.set_replay_data`.

    Megatron cannot route single tokens live while it replays. So padding and last tokens, which have no loss and which
    no token attends to, get K experts from `first_expert` on: give the first one of this rank, and they stay here.

    Args:
        trace: this rank's sequences of the micro-batch.
        rows: int [tokens fed], the trace row of each token in the order Megatron flattens them, [sequence, batch] (see
            `rows_of_padded`), -1 for padding; None: packed, the rows of the trace.
        layers: which of the trace's layers this pipeline stage has routers for; None: all.

    Raises: InputError where a token other than a last one is unknown, a recorded row is not fed, or one is fed twice.
    """
    if not trace.only_last_tokens_unknown:
        raise InputError(
            "trace leaves tokens unrecorded that are not the last of their sequence; Megatron cannot route"
        )
    fed = np.arange(trace.num_tokens) if rows is None else np.asarray(rows)
    if (
        fed.ndim != 1
        or fed.dtype.kind not in "iu"
        or (fed.size and not -1 <= fed.min() <= fed.max() < trace.num_tokens)
    ):
        raise ShapeError(
            f"rows is {fed.dtype} {fed.shape}; it must be integers -1..{trace.num_tokens - 1}, one a token"
        )
    times = np.bincount(fed[fed >= 0], minlength=trace.num_tokens)
    wrong = np.flatnonzero((times > 1) | ((times == 0) & ~trace.unknown))
    if len(wrong):
        raise InputError(f"rows name trace row {wrong[0]} {times[wrong[0]]} times; every recorded row is fed once")
    unknown = np.full((1, trace.num_layers, trace.top_k), -1, trace.expert_ids.dtype)
    ids_TLK = np.concatenate([trace.expert_ids, unknown])[fed].astype(np.int64)
    filler = (first_expert + np.arange(trace.top_k)) % trace.num_experts
    ids_TLK = np.where(ids_TLK < 0, filler, ids_TLK)
    chosen = range(trace.num_layers) if layers is None else layers
    if any(not 0 <= layer < trace.num_layers for layer in chosen):
        raise InputError(f"layers is {list(chosen)}, but the trace has layers 0..{trace.num_layers - 1}")
    return [torch.from_numpy(np.ascontiguousarray(ids_TLK[:, layer])) for layer in chosen]


def rows_of_padded(trace: RoutingTrace, sequence_length: int) -> np.ndarray:
    """int64 [sequence_length * batch]: trace rows of right-padded [sequence, batch] input, -1 for padding."""
    lengths = np.diff(trace.offsets)
    if lengths.max(initial=0) > sequence_length:
        raise InputError(
            f"sequence_length is {sequence_length}, but the trace has a sequence of {lengths.max()} tokens"
        )
    position = np.arange(sequence_length)[:, None]
    return np.where(position < lengths, trace.offsets[:-1] + position, -1).reshape(-1)


@contextmanager
def replaying(targets: Sequence[Tensor]) -> Iterator[None]:
    """Within the block Megatron's routers replay `targets` in forward; set again whatever they did before.

    For recomputed activations, switch to `RouterReplayAction.REPLAY_BACKWARD` before backward, as Megatron documents.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    routers = RouterReplay.global_router_replay_instances
    if len(targets) != len(routers):
        raise InputError(f"targets are for {len(targets)} routers, but this stage has {len(routers)} with RouterReplay")
    before = [router.router_replay_action for router in routers]
    try:
        RouterReplay.set_replay_data(list(targets))
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
    finally:
        RouterReplay.clear_global_indices()
        for router, action in zip(routers, before, strict=True):
            router.router_replay_action = action
