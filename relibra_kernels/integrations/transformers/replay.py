"""Replay of recorded routing in any Hugging Face MoE model.

While a replay is open, the routers of this one model have their choice of experts answered by the recorded experts and
the scores that the router itself gave them; all else that a family does with the scores, and every gradient, stays its
own. What a forward replays is bound to it: activations that are recomputed for its backward, whenever that runs, are
routed as they were, also with other replays open or none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import nn

from ...alignment import Alignment, Shift
from ...planner import RoutingTrace
from ...planner.errors import InputError, ShapeError
from .fed_tokens import Fed, fed_tokens
from .moe_layers import check_trace_of_model, model_inside, moe_layers, not_compiled
from .replayed_rows import Feeder
from .routers import replaying_routers


@contextmanager
def replay(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    token_ids: Sequence[Sequence[int]] | None = None,
    rows: np.ndarray | None = None,
    on_shift: Shift | None = None,
) -> Iterator[Alignment]:
    """Within the block, the routers of `model` choose what `trace` says; tokens that it does not know are routed live.

    A forward must be fed the sequences of the trace, in order and whole: row i of a padded batch is sequence i (the
    attention mask says what is padding), or all of them packed in one row (`cu_seq_lens_q` or `position_ids` say where
    they begin; tails of padding behind them are routed live). With a cache, as in `generate`, the i-th row goes on with
    sequence i from where it is; tokens beyond its end are routed live. Backward may run after the block, and with
    activation checkpointing of either kind.

    Args:
        token_ids: of every sequence; a forward that is fed other ids is refused.
        rows: int [B * S], the trace row of every token that is fed, -1 for padding; for inputs laid out otherwise (a
            share of context parallelism), and for `torch.compile`: without them compiled models run uncompiled within.
        on_shift: whether the record is of these tokens: in the first forward, the top-k sets that the first MoE layers
            would choose are compared with the record. "refuse": an error where fewer than 50 % are equal, a warning
            below 90 %. "warn": a warning below 90 %. "ignore": no comparison, for records of a stale policy. None:
            "refuse"; with `token_ids`, which are checked themselves, as None of `RuntimeOptions`.

    Yields the `Alignment`, whose `share` says how much of the record the model would have chosen itself.
    Raises: InputError where the trace is not of this model, or a forward is not fed its tokens.
    """
    layers = moe_layers(model)
    check_trace_of_model(trace, layers)
    alignment = Alignment(on_shift or ("refuse" if token_ids is None else None))
    feeder = Feeder(trace, layers, token_ids)
    with ExitStack() as stack:
        if rows is not None:
            feeder.use_rows(checked_rows(rows, trace))
        else:
            stack.enter_context(not_compiled(model))
            stack.enter_context(fed_by_forwards(model, feeder.feed))
        stack.enter_context(replaying_routers(layers, feeder, alignment))
        yield alignment


@contextmanager
def fed_by_forwards(model: nn.Module, feed: Callable[[Fed], Any]) -> Iterator[None]:
    """`feed` gets the tokens of every forward of `model`, before it runs."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        feed(fed_tokens(args, kwargs))

    hook = model_inside(model).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def checked_rows(rows: np.ndarray, trace: RoutingTrace) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(f"rows is {rows.dtype} {rows.shape}, but must be integer [tokens fed]")
    if rows.size and not -1 <= rows.min() <= rows.max() < trace.num_tokens:
        raise InputError(f"rows span {rows.min()}..{rows.max()}, but the trace has rows 0..{trace.num_tokens - 1}")
    return rows
