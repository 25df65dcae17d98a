"""The trainers' own forms: verl, slime, prime-rl, NeMo-RL. They carry what vLLM or SGLang recorded.

| trainer | form | the last token | padding |
|---|---|---|---|
| verl | int16 [bs, j, L, K] jagged or padded, or packed [1, total, L, K] | in place, zeros | zeros |
| slime | int32 [len(tokens) - 1, layers, K] a sample | left out | `arange % E`, outside the samples |
| prime-rl | {data, shape, dtype}, uint8 or uint16 [S, L, K] | in place, zeros | none |
| NeMo-RL | "nrlre1:<dtype>:<S>x<L>x<K>:<base64>" | in place, -1 | -1 |
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from ..errors import FormatError, InputError, ShapeError
from ..trace import RoutingTrace
from .encoded import array_of_bytes, decode_base64
from .sequences import SequenceOptions, lengths_of, trace_of_sequences

SIGNED = (np.int8, np.int16, np.int32, np.int64)


def from_verl(
    routed_experts: np.ndarray | Sequence[np.ndarray],
    num_experts: int,
    *,
    attention_mask: np.ndarray | None = None,
    cu_seqlens: Sequence[int] | np.ndarray | None = None,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of a verl batch.

    routed_experts: padded [bs, j, L, K] with `attention_mask` [bs, j], packed [1, total, L, K] or [total, L, K] with
                    `cu_seqlens` [bs + 1], or the rows [n, L, K] of each sequence (a jagged tensor's `unbind()`)
    options:        num_tokens, token_ids, moe_layer_ids, holes, as `SequenceOptions` has them
    """
    if isinstance(routed_experts, np.ndarray):
        arrays = _verl_sequences(routed_experts, attention_mask, cu_seqlens)
    elif attention_mask is not None or cu_seqlens is not None:
        raise InputError("attention_mask and cu_seqlens are for padded and packed arrays, but routed_experts is a list")
    else:
        arrays = [np.asarray(array) for array in routed_experts]
    return trace_of_sequences(arrays, num_experts, last_token="in place", dtypes=(*SIGNED, np.uint8), **options)


def _verl_sequences(
    ids: np.ndarray, attention_mask: np.ndarray | None, cu_seqlens: Sequence[int] | np.ndarray | None
) -> list[np.ndarray]:
    if (attention_mask is None) == (cu_seqlens is None):
        raise InputError("routed_experts needs attention_mask if it is padded, or cu_seqlens if it is packed: give one")
    if attention_mask is not None:
        mask = np.asarray(attention_mask).astype(bool)
        if ids.ndim != 4 or mask.shape != ids.shape[:2]:
            raise ShapeError(
                f"routed_experts has shape {ids.shape} and attention_mask {mask.shape}, but they must be "
                "[bs, tokens, layers, k] and [bs, tokens]"
            )
        changes = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0) == 1
        if (changes.sum(1) > 1).any():
            raise InputError(f"attention_mask of row {int(np.argmax(changes.sum(1) > 1))} has a gap between tokens")
        for row in np.flatnonzero((ids.any((2, 3)) & ~mask).any(1)):
            raise InputError(
                f"routed_experts of row {row} has routing where attention_mask is 0: they are not of the same batch, "
                "or shifted against each other"
            )
        return [row[real] for row, real in zip(ids, mask, strict=True)]
    packed = ids[0] if ids.ndim == 4 and len(ids) == 1 else ids
    offsets = np.asarray(cu_seqlens)
    if packed.ndim != 3 or offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise ShapeError(
            f"routed_experts has shape {ids.shape} and cu_seqlens {offsets.shape}, but they must be "
            "[1, total, layers, k] and [bs + 1]"
        )
    if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) < 0).any() or offsets[-1] > len(packed):
        raise InputError(f"cu_seqlens is {offsets.tolist()[:8]}, but must rise from 0 to at most {len(packed)} rows")
    if packed[int(offsets[-1]) :].any():
        raise InputError(
            f"cu_seqlens ends at {offsets[-1]}, but routed_experts goes on: rows beyond it must be zeros (padding)"
        )
    return np.split(packed[: int(offsets[-1])], offsets[1:-1])


def from_slime(
    rollout_routed_experts: Sequence[np.ndarray],
    num_experts: int,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of slime's samples, `Sample.rollout_routed_experts` each.

    With lengths, rows of slime's padding (`arange % E`, appended for the last token and for alignment) are cut off
    where they are exactly that; any other row too many is a misalignment.
    """
    lengths = lengths_of(options.get("num_tokens"), options.get("token_ids"))
    arrays = [np.asarray(array) for array in rollout_routed_experts]
    if lengths is not None and len(lengths) == len(arrays):
        arrays = [_without_padding(ids, n - 1, num_experts) for ids, n in zip(arrays, lengths, strict=True)]
    what = "rollout_routed_experts"
    return trace_of_sequences(arrays, num_experts, last_token="left out", dtypes=SIGNED, what=what, **options)


def _without_padding(ids: np.ndarray, rows: int, num_experts: int) -> np.ndarray:
    if ids.ndim != 3 or rows < 0 or len(ids) <= rows:
        return ids
    tail, done = ids[rows:], 0
    while done < len(tail):  # it is appended in one piece or two, and each starts with expert 0
        pattern = np.arange(tail[done:].size).reshape(tail[done:].shape) % num_experts
        alike = (tail[done:] == pattern).all((1, 2))
        matching = len(alike) if alike.all() else int(np.argmin(alike))
        if matching == 0:
            return ids
        done += matching
    return ids[:rows]


def from_prime_rl(
    routed_experts: Sequence[Mapping[str, Any]],
    num_experts: int,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of prime-rl's samples: {"data": bytes (base64 in JSON), "shape": [S, L, K], "dtype": "uint8"} each."""
    arrays = []
    for index, sample in enumerate(routed_experts):
        what = f"routed_experts of sequence {index}"
        missing = {"data", "shape", "dtype"} - set(sample)
        if missing:
            raise FormatError(f"{what} has no {sorted(missing)[0]!r}, only {sorted(sample)}")
        if sample["dtype"] not in ("uint8", "uint16"):
            raise FormatError(f"{what} has dtype {sample['dtype']!r}, but must be 'uint8' or 'uint16'")
        data = sample["data"]
        raw = decode_base64(data, what) if isinstance(data, str) else bytes(data)
        arrays.append(array_of_bytes(raw, sample["dtype"], _three_sizes(sample["shape"], what), what))
    return trace_of_sequences(arrays, num_experts, last_token="in place", dtypes=(np.uint8, np.uint16), **options)


def from_nemo_rl(
    routed_experts: Sequence[str],
    num_experts: int,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of NeMo-RL's envelopes, one a sequence; -1 is what was not recorded."""
    arrays = []
    for index, text in enumerate(routed_experts):
        what = f"routed_experts of sequence {index}"
        parts = text.split(":", 3) if isinstance(text, str) else []
        if len(parts) != 4 or parts[0] != "nrlre1" or parts[1] not in ("int8", "int16", "int32"):
            raise FormatError(
                f"{what} starts with {str(text)[:24]!r}, but must be 'nrlre1:<int8|16|32>:<S>x<L>x<K>:...'"
            )
        sizes = _three_sizes(parts[2].split("x"), what)
        arrays.append(array_of_bytes(decode_base64(parts[3], what), parts[1], sizes, what))
    return trace_of_sequences(arrays, num_experts, last_token="in place", dtypes=SIGNED, **options)


def _three_sizes(shape: Any, what: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in shape)
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 0:
        raise FormatError(f"{what} has the shape {shape!r}, but must have three sizes: tokens, layers, k")
    return sizes
