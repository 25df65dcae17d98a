"""What was handed over for one sequence: nothing, one array, or parts of it (turns, resumed rollouts)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import FormatError, InputError, ShapeError
from ..trace_rules import check_id_dtype, compact_dtype, token_chunks
from .response_fields import DTYPE, Said, Version, checked_start, fields_of, said_of

Decode = Callable[[Any, str], Any]  # (payload, what messages call it) -> array of ids [rows, L, K]

NO_ROWS = np.empty((0, 1, 1), np.uint8)


@dataclass(frozen=True)
class Part:
    """Rows that were recorded in one piece.

    ids:      [rows, L, K], staged (see `staged`)
    start:    the token of the sequence that the first row is of; None: nobody said
    tokens:   N of the sequence when the part was done, where the engine says so
    versions: (first, stop, policy) of the tokens that were generated, counted from the first of them; of all where
              `first` and `stop` are None
    """

    ids: np.ndarray
    start: int | None = None
    tokens: int | None = None
    versions: tuple[Version, ...] = ()


def parts_of(entry: Any, decode: Decode, name: str, num_experts: int, start: Any = None) -> list[Part]:
    """The parts of one sequence, in the order in which they were generated.

    entry: None, an array, nested lists of integers or what `decode` takes; a mapping that has such a thing as
        `routed_experts` (or is one itself) beside where it starts; or a list of these, one a part.
    start: of the entry, or a list with one a part. Must agree with what the entry says itself.

    Raises: FormatError, ShapeError, InputError, with `name` in the message.
    """
    if _is_list_of_parts(entry):
        starts = [None] * len(entry) if start is None else start
        if isinstance(starts, int | np.integer):  # where the first part begins; the others follow
            starts = [starts, *[None] * (len(entry) - 1)]
        if not isinstance(starts, Sequence) or len(starts) != len(entry):
            raise InputError(f"starts of {name} is {start!r}, but must be one for each of its {len(entry)} parts")
        return [
            part for one, at in zip(entry, starts, strict=True) for part in parts_of(one, decode, name, num_experts, at)
        ]
    said = Said()
    if isinstance(entry, Mapping):
        fields = fields_of(entry)
        said = said_of(fields, name)
        start = _agreed(start, said.start, name)
        if "routed_experts" in fields:
            payload = _with_dtype(fields["routed_experts"], fields.get(DTYPE))
            return _with_said(parts_of(payload, decode, name, num_experts, start), said)
        if fields is not entry:  # aborted before anything was computed
            entry = None
    if entry is None:
        return _with_said([], said)
    if isinstance(start, Sequence) and len(start) == 1:
        start = start[0]
    at = checked_start(start, name)
    ids = array_of(decode(entry, name), name)
    if ids.size == 0 and (ids.ndim != 3 or len(ids) == 0):
        return [Part(NO_ROWS, at)]
    return [Part(staged(ids, num_experts, name, at or 0), at)]


def _with_said(parts: list[Part], said: Said) -> list[Part]:
    """The parts of one response: its length is that of the last, its versions too where they have spans."""
    if not parts:
        return [] if said.tokens is None else [Part(NO_ROWS, tokens=said.tokens)]
    if said.tokens is not None:
        parts = [*parts[:-1], replace(parts[-1], tokens=said.tokens)]
    if said.versions and said.versions[0].stop is not None:
        return [*parts[:-1], replace(parts[-1], versions=said.versions)]
    return [replace(part, versions=part.versions or said.versions) for part in parts]


def array_of(value: Any, name: str) -> np.ndarray:
    """An array or tensor, or nested lists of integers, as an array. Raises: FormatError."""
    try:
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # torch: bfloat16, jagged tensors
        raise FormatError(f"{name} is no array of [rows, layers, k]: {error}") from None
    if array.dtype.kind not in "iufb":
        raise FormatError(f"{name} is {str(value)[:40]!r}, but must be an array of numbers")
    return array


def rows_of(value: Any) -> Any:
    """A jagged tensor as the list of what it holds, anything else as it is."""
    return list(value.unbind()) if getattr(value, "is_nested", False) else value


def stage_dtype(num_experts: int, top_k: int) -> np.dtype:
    """As compact as the trace's, with a row of ones free to mean that a layer of a token is missing."""
    ambiguous = top_k == 1 and num_experts in (1 << 8, 1 << 16)
    dtype = np.dtype(compact_dtype(num_experts))
    return np.dtype(f"u{2 * dtype.itemsize}") if ambiguous else dtype


def staged(ids_TLK: np.ndarray, num_experts: int, name: str, first_token: int = 0) -> np.ndarray:
    """Compact ids [rows, L, K]; a row of a layer that was not recorded is all ones.

    Not recorded: an id of -1 or (unsigned) the dtype's largest number that is no expert; with K > 1, a row of zeros.
    Raises: ShapeError for other shapes and dtypes, InputError for an id out of range, with its token and layer.
    """
    if ids_TLK.ndim != 3 or 0 in ids_TLK.shape[1:]:
        raise ShapeError(
            f"{name} is {ids_TLK.dtype} of shape {ids_TLK.shape}, but must be integers [tokens, layers, k]"
        )
    check_id_dtype(ids_TLK.dtype, num_experts, name)
    rows, layers, top_k = ids_TLK.shape
    unsigned = ids_TLK.dtype.kind == "u"
    sentinel = np.iinfo(ids_TLK.dtype).max if unsigned else -1
    out = np.empty(ids_TLK.shape, stage_dtype(num_experts, top_k))
    ones = np.iinfo(out.dtype).max
    for part in token_chunks(rows, layers * top_k):
        chunk = ids_TLK[part]
        out[part] = chunk  # -1 becomes all ones
        strange = chunk >= num_experts
        if not unsigned:
            strange |= chunk < 0
        missing = np.zeros(chunk.shape[:2], bool)
        if strange.any():
            absent = strange & (chunk == sentinel)
            if (strange & ~absent).any():
                t, layer, k = (int(x[0]) for x in np.nonzero(strange & ~absent))
                raise InputError(
                    f"{name} names expert {chunk[t, layer, k]}, but there are {num_experts} experts "
                    f"(token {first_token + part.start + t}, layer {layer})"
                )
            missing = absent.any(2)
        if top_k > 1:
            missing |= ~chunk.any(2)
        out[part][missing] = ones
    return out


def missing_layers(staged_TLK: np.ndarray) -> np.ndarray:
    """bool [rows, L]: which were not recorded."""
    ones = np.iinfo(staged_TLK.dtype).max
    missing = staged_TLK[:, :, 0] == ones
    return missing & (staged_TLK[:, :, 1] == ones) if staged_TLK.shape[2] > 1 else missing


def _agreed(start: Any, said: int | None, name: str) -> Any:
    """Where a payload begins, by the payload or by the caller. Raises: InputError where they contradict each other."""
    if start is None or said is None:
        return said if start is None else start
    if not isinstance(start, Sequence) and checked_start(start, name) != said:
        raise InputError(f"{name} says that it starts at {said}, and starts says {start}: they must agree")
    return start


def _with_dtype(payload: Any, dtype: Any) -> Any:
    """The payload together with the dtype that stands beside it, for bytes without a header."""
    if dtype is not None and isinstance(payload, str | bytes):
        return {"data": payload, "dtype": dtype}
    if dtype is not None and isinstance(payload, list) and any(isinstance(part, str | bytes) for part in payload):
        return [_with_dtype(part, dtype) for part in payload]
    return payload


def _is_list_of_parts(entry: Any) -> bool:
    """Whether a list holds payloads, and not rows of ids."""
    if not isinstance(entry, list | tuple):
        return False
    for item in entry:
        if item is None or isinstance(item, str | bytes | Mapping):
            return True
        if hasattr(item, "ndim"):
            return item.ndim == 3 or 0 in item.shape
    return any(_depth(item) == 3 for item in entry)


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list | tuple) and value:
        value, depth = value[0], depth + 1
    return depth
