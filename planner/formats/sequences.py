"""From one array a sequence to a trace: what is common to the engines, and the quirks that they share.

An engine records `[rows, L, K]` for a sequence of N tokens, token after token, and never the routing of the last
sampled token, which it did not feed: its row is left out (N - 1 rows) or filled with zeros (N rows). Dense layers
appear as layers of zeros. A row of zeros names expert 0 K times, so with K > 1 it is no routing.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

from ..errors import InputError, ReLibraError, ShapeError
from ..trace import RoutingTrace, id_dtype

LastToken = Literal["left out", "in place"]
Holes = Literal["refuse", "unknown"]
HOLES: tuple[Holes, ...] = ("refuse", "unknown")


class SequenceOptions(TypedDict, total=False):
    """What every loader of sequences takes.

    num_tokens:    N of each sequence (prompt and completion). A sequence recorded with another length is refused, since
                   routing that is shifted by one token is wrong without any other sign
    token_ids:     the same from the ids of each sequence
    moe_layer_ids: the MoE layers among the recorded ones; None takes every layer that is not zeros throughout
    holes:         what to do with a token inside a sequence that was not recorded: "refuse", or leave it "unknown"
    """

    num_tokens: Sequence[int] | None
    token_ids: Sequence[Sequence[int]] | None
    moe_layer_ids: Sequence[int] | None
    holes: Holes


def trace_of_sequences(
    recorded: Sequence[np.ndarray],
    num_experts: int,
    *,
    last_token: LastToken,
    dtypes: Sequence[type[np.integer]],
    what: str = "routed_experts",
    num_tokens: Sequence[int] | None = None,
    token_ids: Sequence[Sequence[int]] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
    holes: Holes = "refuse",
) -> RoutingTrace:
    """A trace of these sequences, with a row of -1 for every token whose routing was not recorded.

    Args:
        recorded: [rows, L, K] for each sequence; a row of -1 or, with K > 1, of zeros was not recorded.
        last_token: "left out": rows = N - 1, "in place": rows = N.
        dtypes: what the engine hands over; anything else is a mistake of the caller.
        num_tokens, token_ids, moe_layer_ids, holes: see `SequenceOptions`.

    Raises: ShapeError, InputError; they name `what` and the sequence.
    """
    if not len(recorded):
        raise InputError(f"{what} is empty, but must hold at least one sequence")
    num_tokens = lengths_of(num_tokens, token_ids)
    if num_tokens is not None and len(num_tokens) != len(recorded):
        raise InputError(f"num_tokens has {len(num_tokens)} entries, but {what} has {len(recorded)}")
    if holes not in HOLES:
        raise InputError(f"holes is {holes!r}, but must be one of {HOLES}")
    arrays = [np.asarray(array) for array in recorded]
    for index, ids in enumerate(arrays):
        _check_array(f"{what} of sequence {index}", ids, arrays[0], dtypes)
        if num_tokens is not None:
            _check_rows(f"{what} of sequence {index}", len(ids), num_tokens[index], last_token)
    layers = _moe_layers(arrays, what) if moe_layer_ids is None else [int(layer) for layer in moe_layer_ids]
    if not layers or min(layers) < 0 or max(layers) >= arrays[0].shape[1]:
        raise InputError(f"moe_layer_ids is {layers}, but {arrays[0].shape[1]} layers were recorded")
    extra = last_token == "left out"
    offsets = np.cumsum([0, *(len(ids) + extra for ids in arrays)], dtype=np.int64)
    out = np.full((offsets[-1], len(layers), arrays[0].shape[2]), -1, id_dtype(num_experts))
    for index, ids in enumerate(arrays):
        ids = ids[:, layers] if len(layers) < ids.shape[1] else ids
        rows = out[offsets[index] : offsets[index] + len(ids)]
        _fill(rows, ids, num_experts, f"{what} of sequence {index}", holes, last_is_hole=not extra)
    try:
        return RoutingTrace(out, offsets, num_experts, tuple(layers))
    except ReLibraError as error:
        raise type(error)(f"{what}: {error}") from None


def lengths_of(num_tokens: Sequence[int] | None, token_ids: Sequence[Sequence[int]] | None) -> list[int] | None:
    """N of each sequence from either; both must agree."""
    if token_ids is None:
        return None if num_tokens is None else [int(n) for n in num_tokens]
    lengths = [len(ids) for ids in token_ids]
    if num_tokens is not None and list(num_tokens) != lengths:
        raise InputError(f"num_tokens is {list(num_tokens)[:8]}, but token_ids have the lengths {lengths[:8]}")
    return lengths


def _check_array(name: str, ids: np.ndarray, first: np.ndarray, dtypes: Sequence[type[np.integer]]) -> None:
    if ids.ndim != 3 or ids.dtype not in dtypes or ids.shape[1:] != first.shape[1:] or 0 in ids.shape[1:]:
        allowed = [np.dtype(dtype).name for dtype in dtypes]
        listed = " or ".join(", ".join(allowed).rsplit(", ", 1))
        raise ShapeError(
            f"{name} is {ids.dtype} of shape {ids.shape}, but must be {listed} [tokens, layers, k] with the "
            f"layers and k of the first, {first.shape[1:]}"
        )


def _check_rows(name: str, rows: int, tokens: int, last_token: LastToken) -> None:
    needed = tokens - 1 if last_token == "left out" else tokens
    if rows != needed:
        meaning = "one for each token but the last" if last_token == "left out" else "one for each token"
        raise InputError(f"{name} has {rows} rows, but its {tokens} tokens need {needed}: {meaning}")


def _moe_layers(arrays: list[np.ndarray], what: str) -> list[int]:
    """The layers that are not zeros in every sequence."""
    used = np.logical_or.reduce([(ids > 0).any((0, 2)) for ids in arrays])
    if arrays[0].shape[2] == 1 and not used.all() and any(map(len, arrays)):
        raise InputError(
            f"{what} has zeros only in layer {int(np.argmin(used))}: with one choice a token that is a dense layer, or "
            "one whose tokens all chose expert 0; name the MoE layers (moe_layer_ids, --moe-layers)"
        )
    return np.flatnonzero(used).tolist() if used.any() else list(range(len(used)))


def _fill(rows: np.ndarray, ids: np.ndarray, num_experts: int, name: str, holes: Holes, last_is_hole: bool) -> None:
    """Copy ids [n, L, K] into rows, which are -1, but for those that were not recorded."""
    missing = (ids == -1).all((1, 2))
    if ids.shape[2] > 1:
        missing |= (ids == 0).all((1, 2))
    inside = np.flatnonzero(missing[:-1] if last_is_hole else missing)
    if len(inside) and holes == "refuse":
        raise InputError(
            f"{name} has no routing for {len(inside)} tokens, the first is token {inside[0]} (a row of "
            f"{ids[inside[0], 0].tolist()}): padding, or the engine did not record it; with holes 'unknown' (--holes "
            "unknown) such tokens are routed live"
        )
    known = ids[~missing]
    if known.size and (known.min() < 0 or known.max() >= num_experts):
        worst = int(known.max()) if known.max() >= num_experts else int(known.min())
        raise InputError(f"{name} names expert {worst}, but there are {num_experts} experts")
    rows[~missing] = known
