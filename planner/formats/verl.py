"""verl: `routed_experts` of a batch, padded [bs, j, L, K], packed [1, total, L, K], or jagged.

Rows are in place, zeros where there is no routing: the last token, padding, tool results after the last generation of a
multi-turn sample, and whole samples that verl adds to fill up a batch. Its masks say which of these are meant.
"""

from functools import partial
from typing import Any, Unpack

import numpy as np

from ..errors import InputError, ShapeError
from ..trace import RoutingTrace
from .parts import array_of, rows_of
from .row_positions import LastToken
from .sequences import SequenceOptions, trace_of_sequences


def from_verl(
    routed_experts: Any,
    num_experts: int,
    *,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    response_mask: Any = None,
    replay_mask: Any = None,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of a verl batch, a sequence for each of its rows.

    routed_experts: padded [bs, j, L, K] with `attention_mask` [bs, j], packed [1, total, L, K] or [total, L, K] with
                    `cu_seqlens` [bs + 1], or the rows [n, L, K] of each sequence (a list, or a jagged tensor), None for
                    a sample without any; these may lack the last token's row
    attention_mask: padding is left out wherever it is, also between prompt and answer; beside a list or jagged tensor
                    it says the length of each sequence, and which columns of padded masks are its tokens
    response_mask:  0 for tokens of a response that were not generated (tool results, padding): they need no routing.
                    [bs, responses], or of each sequence [responses], the last tokens of the row; None: every token does
    replay_mask:    0 for tokens that are not replayed, laid out like `routed_experts`: they become unknown
    options:        as `SequenceOptions` has them
    """
    routed_experts, response_mask, replay_mask = map(rows_of, (routed_experts, response_mask, replay_mask))
    if isinstance(routed_experts, list | tuple):
        if cu_seqlens is not None:
            raise InputError("cu_seqlens is for packed arrays, but routed_experts is a list")
        sequences: list[Any] = list(routed_experts)
        real = None if attention_mask is None else _real_tokens(rows_of(attention_mask), len(sequences))
        masks = _of_each(response_mask, "response_mask", real, len(sequences))
        masks = masks and [mask if mask is None else partial(needed_tokens, mask) for mask in masks]
        replay = _of_each(replay_mask, "replay_mask", real, len(sequences))
        if real is not None and options.get("num_tokens") is None:
            options["num_tokens"] = [int(row.sum()) for row in real]
    else:
        ids = array_of(routed_experts, "routed_experts")
        if (attention_mask is None) == (cu_seqlens is None):
            raise InputError(
                "routed_experts needs attention_mask if it is padded, or cu_seqlens if it is packed: give one"
            )
        if attention_mask is not None:
            sequences, masks, replay = _padded(ids, attention_mask, response_mask, replay_mask)
        else:
            if response_mask is not None:
                raise InputError("response_mask goes with attention_mask or a list, but routed_experts is packed")
            sequences = _packed(ids, cu_seqlens)
            masks, replay = None, None if replay_mask is None else _packed_mask(replay_mask, cu_seqlens)
        if options.get("num_tokens") is None and options.get("token_ids") is None:
            options["num_tokens"] = [len(sequence) for sequence in sequences]
    for name, value in (("masks", masks), ("replay_masks", replay)):
        if value is not None:
            options[name] = value  # type: ignore[literal-required]
    last_token: LastToken = "either" if isinstance(routed_experts, list | tuple) else "in place"
    return trace_of_sequences(sequences, num_experts, last_token=last_token, **options)


def _real_tokens(attention_mask: Any, count: int) -> list[np.ndarray]:
    """Of each sequence bool [its row of the padded batch]."""
    rows = [array_of(row, "attention_mask").astype(bool).reshape(-1) for row in attention_mask]
    if len(rows) != count:
        raise ShapeError(f"attention_mask has {len(rows)} rows, but routed_experts has {count} sequences")
    return rows


def _of_each(mask: Any, name: str, real: list[np.ndarray] | None, count: int) -> list[Any] | None:
    """The mask of each sequence; of padded ones what `real` tokens have. Raises: ShapeError."""
    if mask is None:
        return None
    if isinstance(mask, list | tuple):
        rows = list(mask)
    else:
        padded = array_of(mask, name)
        if padded.ndim != 2 or real is None or padded.shape[1] > min(map(len, real), default=0):
            raise ShapeError(
                f"{name} has shape {padded.shape}, but routed_experts is a list: give the attention_mask of the padded "
                f"batch, whose last columns {name} has, or a list with the mask of each sequence"
            )
        rows = [row[of[len(of) - len(row) :]] for row, of in zip(padded, real, strict=False)]
    if len(rows) != count:
        raise ShapeError(f"{name} has {len(rows)} entries, but routed_experts has {count} sequences")
    return rows


def needed_tokens(response_mask: Any, tokens: int) -> np.ndarray:
    """bool [tokens]: the prompt, and what was generated; nothing of a sample without anything generated.

    Raises: ShapeError where the response is longer than the sequence.
    """
    mask = np.asarray(array_of(response_mask, "response_mask")).astype(bool).reshape(-1)
    if len(mask) > tokens:
        raise ShapeError(f"response_mask has {len(mask)} tokens, but its sequence has {tokens}")
    return np.concatenate([np.full(tokens - len(mask), bool(mask.any())), mask])


def _padded(
    ids: np.ndarray, attention_mask: Any, response_mask: Any, replay_mask: Any
) -> tuple[list[Any], list[np.ndarray] | None, list[np.ndarray] | None]:
    mask = np.asarray(array_of(attention_mask, "attention_mask")).astype(bool)
    if ids.ndim != 4 or mask.shape != ids.shape[:2]:
        raise ShapeError(
            f"routed_experts has shape {ids.shape} and attention_mask {mask.shape}, but they must be "
            "[bs, tokens, layers, k] and [bs, tokens]"
        )
    for row, (of_row, real) in enumerate(zip(ids, mask, strict=True)):
        if not _blank(of_row[~real]).all():
            raise InputError(
                f"routed_experts of row {row} has routing where attention_mask is 0: they are not of the same batch, "
                "or shifted against each other"
            )
    needed = replay = None
    if response_mask is not None:
        response = np.asarray(array_of(response_mask, "response_mask")).astype(bool)
        if response.ndim != 2 or len(response) != len(mask) or response.shape[1] > mask.shape[1]:
            raise ShapeError(f"response_mask has shape {response.shape}, but must be [{len(mask)}, responses]")
        needed = [needed_tokens(row, mask.shape[1])[real] for row, real in zip(response, mask, strict=True)]
    if replay_mask is not None:
        replayed = np.asarray(array_of(replay_mask, "replay_mask")).astype(bool)
        if replayed.shape != mask.shape:
            raise ShapeError(f"replay_mask has shape {replayed.shape}, but must be {mask.shape}, as attention_mask")
        replay = [row[real] for row, real in zip(replayed, mask, strict=True)]
    return [row[real] for row, real in zip(ids, mask, strict=True)], needed, replay


def _blank(rows_TLK: np.ndarray) -> np.ndarray:
    """bool [rows]: zeros, or -1."""
    return ~rows_TLK.any((1, 2)) | (rows_TLK == -1).all((1, 2))


def _packed(ids: np.ndarray, cu_seqlens: Any) -> list[np.ndarray]:
    packed = ids[0] if ids.ndim == 4 and len(ids) == 1 else ids
    offsets = np.asarray(array_of(cu_seqlens, "cu_seqlens"))
    if packed.ndim != 3 or offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise ShapeError(
            f"routed_experts has shape {ids.shape} and cu_seqlens {offsets.shape}, but they must be "
            "[1, total, layers, k] and [bs + 1]"
        )
    if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) < 0).any() or offsets[-1] > len(packed):
        raise InputError(f"cu_seqlens is {offsets.tolist()[:8]}, but must rise from 0 to at most {len(packed)} rows")
    tail = packed[int(offsets[-1]) :]
    if not _blank(tail).all():
        raise InputError(
            f"cu_seqlens ends at {offsets[-1]}, but routed_experts goes on: rows beyond it must be zeros (padding)"
        )
    return np.split(packed[: int(offsets[-1])], offsets[1:-1].astype(np.int64))


def _packed_mask(mask: Any, cu_seqlens: Any) -> list[np.ndarray]:
    flat = np.asarray(array_of(mask, "replay_mask")).astype(bool).reshape(-1)
    offsets = np.asarray(array_of(cu_seqlens, "cu_seqlens")).astype(np.int64)
    if len(flat) < offsets[-1]:
        raise ShapeError(f"replay_mask has {len(flat)} entries, but cu_seqlens ends at {offsets[-1]}")
    return np.split(flat[: int(offsets[-1])], offsets[1:-1])
