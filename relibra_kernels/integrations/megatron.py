"""Megatron-LM: a plan as the maps that its token dispatcher needs, and a trace as the targets of `RouterReplay`.

Megatron numbers experts by place: rank r computes the columns `r * slots` to `(r + 1) * slots - 1` of the routing map.
A plan that moves or replicates experts therefore becomes a routing map whose columns are places, and a table that says
whose weights belong in each place; `slots` is E/R without replicas and E/R + S with them. Written against megatron-core
0.16.1, whose `RouterReplay` accepts too few rows and an expert twice without a word: that is refused here.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..planner import RoutingTrace
from ..planner.errors import InputError, ShapeError
from ..planner.trace_rules import checked_numbers
from .megatron_choice import RecordedChoice
from .places import expert_of_place, place_of_expert, places_of_assignments

__all__ = [
    "check_config",
    "expert_of_place",
    "place_of_expert",
    "places_of_assignments",
    "replay_targets",
    "replaying",
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
            `megatron_shares.TokenShare`), -1 for padding; None: packed, the rows of the trace.
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


@contextmanager
def replaying(targets: Sequence[Tensor], model: Any = None) -> Iterator[None]:
    """Within the block the routers of `model` replay `targets` in forward; then they do again what they did before.

    For recomputed activations, switch to `RouterReplayAction.REPLAY_BACKWARD` before backward, as Megatron documents:
    the targets stay in the routers' `replay_backward_list`, a micro-batch after the other, until they are recomputed.
    Where gradients are off at the beginning of the block, nothing stays. Without recomputation call
    `RouterReplay.clear_global_indices()` after the step.

    Args:
        targets: of `replay_targets`; a row of -1 is routed live.
        model: the module, or a list of them (virtual pipeline stages), whose routers replay, by Megatron's
            `RouterReplay` or by verl's class of that name; those of multi-token prediction have targets only where
            there are enough. None: all of Megatron's in the process.

    Raises: InputError where there is another number of routers than of targets.
    """
    if model is None:
        from megatron.core.transformer.moe.router_replay import RouterReplay

        routers = list(RouterReplay.global_router_replay_instances)
    else:
        routers = replays_of(model, len(targets), "router_replay")
    if len(targets) != len(routers):
        hint = "; name the model whose routers they are" if model is None else ""
        raise InputError(
            f"targets are for {len(targets)} routers, but this stage has {len(routers)} with RouterReplay{hint}"
        )
    before = [(router.target_topk_idx, _mask_of(router), router.router_replay_action) for router in routers]
    keep, done = torch.is_grad_enabled(), False
    fed = list(targets)
    try:
        for index, router in enumerate(routers):
            fed[index] = _fed(router, targets[index])
        yield
        done = True
    finally:
        for router, target, (target_before, mask, action) in zip(routers, fed, before, strict=True):
            router.__dict__.pop("get_replay_topk", None)
            if not (keep and done):
                own = (target, router.target_topk_idx)  # the second with what was routed live
                listed = router.replay_backward_list
                stays = [i for i, one in enumerate(listed) if all(one is not mine for mine in own)]
                for held in (listed, getattr(router, "replay_backward_mask_list", None)):
                    if held is not None:
                        held[:] = [held[i] for i in stays]
            router.target_topk_idx, router.router_replay_action = target_before, action
            if hasattr(router, "target_replay_mask"):
                router.target_replay_mask = mask


def _mask_of(router: Any) -> Any:
    return getattr(router, "target_replay_mask", None)


def _fed(router: Any, target: Tensor) -> Tensor:
    """Have one router replay a target; what it was given."""
    live_T = (target < 0).all(1)
    if hasattr(router, "target_replay_mask"):  # verl's: has a mask of the rows that are replayed
        target = target.clamp(min=0)
        router.set_target_indices(target, replay_mask=~live_T if bool(live_T.any()) else None)
    else:
        router.set_target_indices(target)
        if bool(live_T.any()):
            router.get_replay_topk = _with_live_rows(router)
    actions = sys.modules[type(router).__module__].RouterReplayAction  # of Megatron, or verl's own
    router.set_router_replay_action(actions.REPLAY_FORWARD)
    return target


def replays_of(model: Any, wanted: int, attribute: str) -> list[Any]:
    """The replay object of each router of a model in module order, multi-token prediction only where it is wanted."""
    found: dict[int, tuple[str, Any]] = {}
    for index, part in enumerate(model if isinstance(model, list | tuple) else [model]):
        for name, module in part.named_modules():
            replay = getattr(module, attribute, None)
            if isinstance(replay, RecordedChoice):  # of our layer
                replay = replay.before
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
