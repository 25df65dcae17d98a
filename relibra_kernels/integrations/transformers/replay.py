"""Replay of recorded routing in any Hugging Face MoE model.

Every router picks its experts with `torch.topk` over its scores. While a replay is open, the routers of this one model
run with that call answered by the recorded experts and the scores that the router itself gave them; all else that a
family does with the scores, and every gradient, stays its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...planner import RoutingTrace
from ...planner.errors import InputError, ShapeError
from .layers import Fed, MoeLayer, check_trace, fed_tokens, moe_layers


@contextmanager
def replay(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    token_ids: Sequence[Sequence[int]] | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[None]:
    """Within the block, the routers of `model` choose what `trace` says; tokens that it does not know are routed live.

    A forward must be fed the sequences of the trace, in order and whole: row i of a padded batch is sequence i (the
    attention mask says what is padding), or all of them packed in one row. With a cache, as in `generate`, the i-th
    row goes on with sequence i from where it is; tokens beyond its end are routed live. Run backward inside the block
    where activations are recomputed.

    Args:
        token_ids: of every sequence; a forward that is fed other ids is refused. Give them: routing that is shifted by
            one token has no other sign.
        rows: int [B * S], the trace row of every token that is fed, -1 for padding; for inputs laid out otherwise, for
            `torch.compile`, and where nothing may wait for the device.

    Raises: InputError where the trace is not of this model, or a forward is not fed its tokens.
    """
    layers = moe_layers(model)
    check_trace(trace, layers)
    feeder = Feeder(trace, layers, token_ids)
    with ExitStack() as stack:
        if rows is not None:
            feeder.use_rows(checked_rows(rows, trace))
        else:
            stack.enter_context(fed_by_forwards(model, feeder.feed))
        stack.enter_context(replaying_routers(layers, feeder))
        yield


@contextmanager
def fed_by_forwards(model: nn.Module, feed: Callable[[Fed], Any]) -> Iterator[None]:
    """`feed` gets the tokens of every forward of `model`, before it runs."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        feed(fed_tokens(args, kwargs))

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def replaying_routers(layers: list[MoeLayer], feeder: "Feeder") -> Iterator[None]:
    """The routers choose what `feeder` has for them."""
    before = [layer.router.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.router.forward = _replaying(layer, feeder, index)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.router.__dict__.pop("forward", None)
            if forward is not None:
                layer.router.forward = forward


class Feeder:
    """Which recorded experts the tokens of the current forward get: `indices`, int64 [T, K] a layer."""

    def __init__(self, trace: RoutingTrace, layers: list[MoeLayer], token_ids: Sequence[Sequence[int]] | None):
        self._trace, self._layers = trace, layers
        self._lengths = np.diff(trace.offsets)
        self._token_ids: np.ndarray | None = None
        if token_ids is not None:
            lengths = [len(ids) for ids in token_ids]
            if lengths != self._lengths.tolist():
                raise InputError(
                    f"token_ids have the lengths {lengths[:8]}, but the trace's sequences {self._lengths.tolist()[:8]}"
                )
            parts = [np.asarray(ids, np.int64) for ids in token_ids]
            self._token_ids = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        self._done = np.zeros(trace.num_sequences, np.int64)  # tokens of each sequence that a cache holds
        self.indices: list[Tensor] | None = None
        self.all_known = False

    def feed(self, fed: Fed) -> np.ndarray:
        """Get ready for a forward that is fed these tokens; their rows in the trace, int64 [B * S]."""
        rows = self._whole(fed) if fed.cached is None else self._continued(fed)
        if self._token_ids is not None and fed.token_ids is not None:
            self._check_token_ids(fed, rows)
        self.use_rows(rows.reshape(-1))
        return rows.reshape(-1)

    def use_rows(self, rows_T: np.ndarray) -> None:
        unknown = np.full((1, *self._trace.expert_ids.shape[1:]), -1, self._trace.expert_ids.dtype)
        ids_TLK = np.concatenate([self._trace.expert_ids, unknown])[rows_T]  # row -1 is the last one
        self.all_known = bool((ids_TLK >= 0).all())
        ids = torch.from_numpy(ids_TLK.astype(np.int64))
        self.indices = [ids[:, i].to(_device(layer.router)) for i, layer in enumerate(self._layers)]

    def _whole(self, fed: Fed) -> np.ndarray:
        """Rows [B, S] where a forward is fed every sequence from its first to its last token."""
        per_row = fed.real.sum(1)
        packed = len(per_row) != len(self._lengths) and len(per_row) == 1
        expected = [self._trace.num_tokens] if packed else self._lengths.tolist()
        if per_row.tolist() != expected:
            raise InputError(
                f"the forward was fed rows of {per_row.tolist()[:8]} tokens without padding, but the trace has "
                f"sequences of {self._lengths.tolist()[:8]}; feed them whole and in order, or say which trace row each "
                "token is (rows)"
            )
        rows = np.full(fed.real.shape, -1, np.int64)
        rows[fed.real] = np.arange(self._trace.num_tokens)
        return rows

    def _continued(self, fed: Fed) -> np.ndarray:
        """Rows [B, S] where a cache holds the tokens before."""
        if len(fed.real) != len(self._lengths):
            raise InputError(
                f"the forward was fed {len(fed.real)} rows, but the trace has {len(self._lengths)} sequences"
            )
        if fed.cached == 0:
            self._done[:] = 0
        position = self._done[:, None] + fed.real.cumsum(1) - 1
        inside = fed.real & (position < self._lengths[:, None])
        self._done += fed.real.sum(1)
        return np.where(inside, self._trace.offsets[:-1, None] + position, -1)

    def _check_token_ids(self, fed: Fed, rows: np.ndarray) -> None:
        assert self._token_ids is not None and fed.token_ids is not None
        expected = np.append(self._token_ids, -1)[rows]
        wrong = np.argwhere((rows >= 0) & (expected != fed.token_ids))
        if len(wrong):
            b, s = wrong[0]
            sequence = int(np.searchsorted(self._trace.offsets, rows[b, s], side="right")) - 1
            position = rows[b, s] - self._trace.offsets[sequence]
            raise InputError(
                f"the forward was fed token {fed.token_ids[b, s]} at [{b}, {s}], but the routing there was recorded "
                f"for token {expected[b, s]} (sequence {sequence}, position {position}); {len(wrong)} tokens differ: "
                "another batch, or one that is shifted"
            )


class _AnswerTopK(TorchFunctionMode):
    """Answers a router's choice of experts, and the choice of groups before it, with what was recorded."""

    def __init__(self, layer: MoeLayer, recorded_TK: Tensor, all_known: bool):
        super().__init__()
        self._recorded, self._all_known, self.answered = recorded_TK, all_known, False
        self._num_experts, self._top_k = layer.num_experts, layer.top_k
        self._groups = int(getattr(layer.router, "num_group", None) or 1)
        self._groups_per_token = getattr(layer.router, "topk_group", None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.topk and func is not torch.Tensor.topk:
            return func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        k = args[1] if len(args) > 1 else kwargs["k"]
        if scores.ndim == 2 and scores.shape[1] == self._groups and k == self._groups_per_token:
            scores = scores.masked_fill(self._recorded_groups(), float("inf"))
            return scores.topk(k, dim=-1)
        if scores.ndim != 2 or scores.shape[1] != self._num_experts or k != self._top_k:
            return func(*args, **kwargs)
        self.answered = True
        indices = self._recorded
        if not self._all_known:
            indices = torch.where(indices < 0, scores.topk(k, dim=-1).indices, indices)
        return torch.return_types.topk((scores.gather(1, indices), indices))

    def _recorded_groups(self) -> Tensor:
        """bool [T, G]: a router that closes other groups must leave those of the recorded experts open."""
        group_TK = self._recorded.clamp(min=0) // (self._num_experts // self._groups)
        hit_TG = torch.zeros(len(group_TK), self._groups, device=group_TK.device)
        return hit_TG.scatter_add(1, group_TK, (self._recorded >= 0).to(hit_TG.dtype)) > 0


def _replaying(layer: MoeLayer, feeder: Feeder, index: int) -> Callable[..., Any]:
    original = layer.router.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if feeder.indices is None:
            raise InputError(f"the router of {layer.name} runs outside of the model that is replayed")
        recorded_TK = feeder.indices[index]
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if len(recorded_TK) != tokens:
            raise ShapeError(
                f"the router of {layer.name} got {tokens} tokens, but the replay is for {len(recorded_TK)}"
            )
        mode = _AnswerTopK(layer, recorded_TK, feeder.all_known)
        with mode:
            out = original(hidden_states, *args, **kwargs)
        if not mode.answered:
            raise InputError(
                f"the router of {layer.name} ({type(layer.router).__name__}) does not choose {layer.top_k} of "
                f"{layer.num_experts} experts with torch.topk, so that nothing can be replayed in it"
            )
        return out

    return forward


def checked_rows(rows: np.ndarray, trace: RoutingTrace) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(f"rows is {rows.dtype} {rows.shape}, but must be integer [tokens fed]")
    if rows.size and not -1 <= rows.min() <= rows.max() < trace.num_tokens:
        raise InputError(f"rows span {rows.min()}..{rows.max()}, but the trace has rows 0..{trace.num_tokens - 1}")
    return rows


def _device(router: nn.Module) -> torch.device:
    weight: Any = router.weight
    return weight.device
