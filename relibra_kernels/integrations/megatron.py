"""Megatron-LM: a plan as the maps that its token dispatcher needs, and a trace as the targets of `RouterReplay`.

Megatron numbers experts by place: rank r computes the columns `r * slots` to `(r + 1) * slots - 1` of the routing map.
A plan that moves or replicates experts therefore becomes a routing map whose columns are places, and a table that says
whose weights belong in each place; `slots` is E/R without replicas and E/R + S with them. Written against megatron-core
0.16.1, whose `RouterReplay` accepts too few rows and an expert twice without a word: that is refused here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..planner import RoutingTrace
from ..planner.errors import InputError, ShapeError
from ..planner.trace_rules import checked_numbers
from .places import expert_of_place, place_of_expert, places_of_assignments

__all__ = [
    "check_config",
    "expert_of_place",
    "place_of_expert",
    "places_of_assignments",
    "replay_targets",
    "replaying",
    "rows_of_context_parallel",
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
    whole: bool = True,
    holes: Literal["refuse", "live"] = "refuse",
) -> list[Tensor]:
    """int64 [tokens fed, K] for each router of this pipeline stage, for `replaying`.

    Padding and last tokens, which have no loss and which no token attends to, get K experts from `first_expert` on:
    give the first one of this rank, and they stay here.

    Args:
        trace: this rank's sequences of the micro-batch.
        rows: int [tokens fed], the trace row of each token in the order Megatron flattens them, [sequence, batch] (see
            `rows_of_padded`, `rows_of_context_parallel`), -1 for padding; None: packed, the rows of the trace.
        layers: which of the trace's layers this pipeline stage has routers for, counted from 0; None: all. By the
            model's layer numbers: `trace.slice_layers`.
        whole: whether every recorded row must be fed. False for a share of context or sequence parallelism.
        holes: of a token other than a last one that is unknown: "refuse" the trace, or have it routed "live" within
            `replaying` (rows of -1, which Megatron's own `set_replay_data` does not take).

    Raises: InputError where a token cannot be routed, a recorded row is not fed although `whole`, or one is fed twice.
    """
    if holes not in ("refuse", "live"):
        raise InputError(f"holes is {holes!r}; it must be 'refuse' or 'live'")
    if holes == "refuse" and not trace.only_last_tokens_unknown:
        raise InputError(
            "trace leaves tokens unrecorded that are not the last of their sequence, which Megatron does not route by "
            "itself while it replays; holes='live' has `replaying` do it"
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
    wrong = np.flatnonzero((times > 1) | (whole & (times == 0) & ~trace.unknown))
    if len(wrong):
        hint = "" if times[wrong[0]] else " (whole=False for a rank's share of the tokens)"
        raise InputError(
            f"rows name trace row {wrong[0]} {times[wrong[0]]} times; every recorded row is fed once{hint}"
        )
    chosen = range(trace.num_layers) if layers is None else checked_numbers(layers, "layers").tolist()
    if any(not 0 <= layer < trace.num_layers for layer in chosen):
        raise InputError(f"layers is {list(chosen)}, but the trace has layers 0..{trace.num_layers - 1}")
    ids_TLK = trace.rows(fed).astype(np.int64)
    filled = ids_TLK[:, 0, 0] < 0
    if holes == "live":
        last = np.zeros(trace.num_tokens + 1, bool)
        last[[*(trace.offsets[1:][np.diff(trace.offsets) > 0] - 1), -1]] = True  # row -1, padding, too
        filled &= last[fed]
    ids_TLK[filled] = (first_expert + np.arange(trace.top_k)) % trace.num_experts
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


def rows_of_context_parallel(trace: RoutingTrace, rank: int, size: int, *, zigzag: bool = True) -> np.ndarray:
    """int64 [tokens fed]: trace rows of the share that a rank of context parallelism has of packed sequences.

    Every sequence is padded (-1) to a multiple of the chunks that it is cut into: with `zigzag`, as Megatron does, 2 *
    size, of which the rank has chunks `rank` and `2 * size - 1 - rank`; without, `size`, of which it has chunk `rank`.
    """
    whole = all(isinstance(value, int | np.integer) for value in (rank, size))
    if not whole or not 0 <= rank < size:
        raise InputError(f"rank is {rank!r}; it must be one of the {size} ranks of context parallelism")
    chunks = 2 * size if zigzag else size
    mine = (rank, chunks - 1 - rank) if zigzag else (rank,)
    shares = [np.zeros(0, np.int64)]
    for start, length in zip(trace.offsets[:-1], np.diff(trace.offsets), strict=True):
        position = np.arange(-(-length // chunks) * chunks)
        rows = np.where(position < length, start + position, -1).reshape(chunks, -1)
        shares += [rows[chunk] for chunk in mine]
    return np.concatenate(shares)


@contextmanager
def replaying(targets: Sequence[Tensor], model: Any = None) -> Iterator[None]:
    """Within the block the routers of `model` replay `targets` in forward; then they do again what they did before.

    For recomputed activations, switch to `RouterReplayAction.REPLAY_BACKWARD` before backward, as Megatron documents:
    the targets stay in the routers' `replay_backward_list`, a micro-batch after the other, until they are recomputed.
    Where gradients are off at the beginning of the block, nothing stays. Without recomputation call
    `RouterReplay.clear_global_indices()` after the step.

    Args:
        targets: of `replay_targets`; a row of -1 is routed live.
        model: the module, or a list of them (virtual pipeline stages), whose routers replay; those of multi-token
            prediction have targets only where there are enough. None: all routers of the process.

    Raises: InputError where there is another number of routers than of targets.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    routers = list(RouterReplay.global_router_replay_instances) if model is None else _replays_of(model, len(targets))
    if len(targets) != len(routers):
        hint = "; name the model whose routers they are" if model is None else ""
        raise InputError(
            f"targets are for {len(targets)} routers, but this stage has {len(routers)} with RouterReplay{hint}"
        )
    before = [(router.target_topk_idx, router.router_replay_action) for router in routers]
    keep, done = torch.is_grad_enabled(), False
    try:
        for router, target in zip(routers, targets, strict=True):
            router.set_target_indices(target)
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            if bool((target < 0).any()):
                router.get_replay_topk = _with_live_rows(router)
        yield
        done = True
    finally:
        for router, target, (target_before, action) in zip(routers, targets, before, strict=True):
            router.__dict__.pop("get_replay_topk", None)
            if not (keep and done):
                own = (target, router.target_topk_idx)  # the second with what was routed live
                router.replay_backward_list[:] = [
                    one for one in router.replay_backward_list if all(one is not mine for mine in own)
                ]
            router.target_topk_idx, router.router_replay_action = target_before, action


def _replays_of(model: Any, wanted: int) -> list[Any]:
    """The RouterReplay of each router of a model in module order, multi-token prediction only where it is wanted."""
    found: dict[int, tuple[str, Any]] = {}
    for index, part in enumerate(model if isinstance(model, list | tuple) else [model]):
        for name, module in part.named_modules():
            replay = getattr(module, "router_replay", None)
            if replay is not None:
                found.setdefault(id(replay), (f"{index}.{name}", replay))
    named = list(found.values())
    if len(named) != wanted:
        named = [(name, replay) for name, replay in named if not any("mtp" in part for part in name.split("."))]
    return [replay for _, replay in named]


def _with_live_rows(router: Any) -> Any:
    """`get_replay_topk` of one router whose target has rows of -1; what it chooses for them is recomputed later."""
    replayed = router.get_replay_topk

    def get_replay_topk(scores: Tensor, topk: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        target = router.target_topk_idx
        live_T = (target < 0).all(1)
        action, router.router_replay_action = router.router_replay_action, None
        try:
            chosen = replayed(scores, topk, *args, **kwargs)[1]
        finally:
            router.router_replay_action = action
        router.target_topk_idx = torch.where(live_T[:, None].to(scores.device), chosen, target.to(scores.device))
        router.replay_backward_list[:] = [
            router.target_topk_idx if one is target else one for one in router.replay_backward_list
        ]
        return replayed(scores, topk, *args, **kwargs)

    return get_replay_topk
