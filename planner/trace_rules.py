"""What expert ids must be: in range, no expert twice for one token, a token known in every layer or in none.

A trace keeps ids unsigned and as narrow as they go (`compact_dtype`). The row of an unknown token is all ones there,
which is -1 where the same bytes are read as signed.
"""

from collections.abc import Iterator

import numpy as np

from .errors import InputError, ShapeError

MAX_EXPERTS = 1 << 16
_CHUNK = 1 << 18  # assignments looked at together: a few copies of them stay in the second-level cache


def compact_dtype(num_experts: int) -> type[np.unsignedinteger]:
    """How a trace keeps ids: one byte each up to 256 experts, two beyond."""
    return np.uint8 if num_experts <= 256 else np.uint16


def id_dtype(num_experts: int) -> type[np.signedinteger]:
    """The narrowest signed dtype that holds -1 to num_experts - 1."""
    return next(dtype for dtype in (np.int8, np.int16, np.int32) if num_experts - 1 <= np.iinfo(dtype).max)


def check_num_experts(value: object) -> int:
    """`value` as a number of experts. Raises: InputError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= MAX_EXPERTS:
        raise InputError(f"num_experts is {value!r}, but must be an integer from 1 to {MAX_EXPERTS}")
    return int(value)


def check_id_dtype(dtype: np.dtype, num_experts: int, name: str) -> None:
    """Refuse a dtype that is no integer, or too narrow for the ids: those that did not fit have wrapped around."""
    if dtype.kind not in "iu":
        raise ShapeError(f"{name} is {dtype}, but expert ids must be integers")
    if np.iinfo(dtype).max < num_experts - 1:
        raise ShapeError(
            f"{name} is {dtype}, which cannot hold the ids of {num_experts} experts: they have wrapped around"
        )


def check_offsets(value: object, tokens: int) -> np.ndarray:
    """`value` as int64 [sequences + 1], which rises from 0 to `tokens`. Raises: ShapeError, InputError."""
    offsets = np.asarray(value)
    if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
        raise ShapeError(f"offsets is {offsets.dtype} {offsets.shape}, but must be integer [sequences + 1]")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise InputError(f"offsets run from {offsets[0]} to {offsets[-1]}, but must run from 0 to the {tokens} tokens")
    if (np.diff(offsets) < 0).any():
        raise InputError(f"offsets decrease at sequence {int(np.argmax(np.diff(offsets) < 0))}")
    return offsets


def checked_numbers(value: object, name: str) -> np.ndarray:
    """`value` as int64 [n]: the numbers of sequences or layers. Raises: InputError, for masks too."""
    try:
        numbers = np.asarray(value if hasattr(value, "__array__") else list(value))  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError):
        numbers = np.zeros((), object)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise InputError(f"{name} is {str(value)[:60]}, but must be integers (of a mask: np.flatnonzero(mask))")
    return numbers.astype(np.int64)


def token_chunks(num_tokens: int, per_token: int) -> Iterator[slice]:
    """Slices of whole tokens, of about _CHUNK assignments each."""
    step = max(1, _CHUNK // per_token)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def check_ids(
    ids_TLK: np.ndarray,
    num_experts: int,
    unknown_T: np.ndarray | None = None,
    name: str = "expert_ids",
    layer_ids: tuple[int, ...] | None = None,
) -> np.ndarray:
    """bool [tokens]: which tokens are unknown. Raises: InputError, naming the token and the layer.

    Args:
        ids_TLK: any integer dtype. Of signed ids, -1 in every layer says that a token is unknown.
        unknown_T: bool, which tokens are unknown; their ids are not looked at, unless they are signed.
        layer_ids: what messages call the layers; None: 0 to L - 1.
    """
    tokens, layers, top_k = ids_TLK.shape
    signed = ids_TLK.dtype.kind == "i"
    found_T = np.zeros(tokens, bool) if unknown_T is None or signed else unknown_T
    for part in token_chunks(tokens, layers * top_k):
        chunk = ids_TLK[part]
        if signed:
            found_T[part] = _unknown(chunk, part.start, name)
        hidden = found_T[part]
        known = np.arange(part.start, part.stop) if not hidden.any() else part.start + np.flatnonzero(~hidden)
        chunk = chunk if len(known) == len(chunk) else chunk[~hidden]
        if len(chunk):
            _check_known(chunk, known, num_experts, name, layer_ids or tuple(range(layers)))
    if unknown_T is not None and signed and (found_T != unknown_T).any():
        token = int(np.argmax(found_T != unknown_T))
        raise InputError(
            f"{name} of token {token} is {'-1' if found_T[token] else 'known'}, but unknown says otherwise"
        )
    return found_T


def _unknown(chunk: np.ndarray, first: int, name: str) -> np.ndarray:
    if int(chunk.min()) >= 0:
        return np.zeros(len(chunk), bool)
    flat = chunk.reshape(len(chunk), -1) == -1
    unknown = flat.all(1)
    partly = flat.any(1) & ~unknown
    if partly.any():
        token = first + int(np.argmax(partly))
        raise InputError(f"{name} of token {token} are -1 in part: a token is known in every layer, or in none")
    return unknown


def _check_known(
    chunk: np.ndarray, tokens: np.ndarray, num_experts: int, name: str, layer_ids: tuple[int, ...]
) -> None:
    layers, top_k = chunk.shape[1:]
    if int(chunk.max()) >= num_experts or int(chunk.min()) < 0:
        t, layer, k = (int(x[0]) for x in np.nonzero((chunk < 0) | (chunk >= num_experts)))
        raise InputError(
            f"{name} of token {tokens[t]}, layer {layer_ids[layer]} names expert {chunk[t, layer, k]}, "
            f"but there are {num_experts} experts (-1: not recorded)"
        )
    by_choice = np.ascontiguousarray(chunk.reshape(-1, top_k).T)  # [K, n * L]: comparisons run over long rows
    twice = np.zeros(by_choice.shape[1], bool)
    for k in range(1, top_k):
        for other in range(k):
            twice |= by_choice[k] == by_choice[other]
    if twice.any():
        row = int(np.argmax(twice))
        raise InputError(
            f"{name} of token {tokens[row // layers]}, layer {layer_ids[row % layers]} are "
            f"{by_choice[:, row].tolist()}: an expert is chosen twice (a row of zeros is padding, not routing)"
        )


def compacted(ids: np.ndarray, unknown: np.ndarray, num_experts: int) -> np.ndarray:
    """Checked ids as a trace keeps them, rows of ones where unknown: a view where they are kept so already."""
    dtype = np.dtype(compact_dtype(num_experts))
    if ids.itemsize == dtype.itemsize and ids.dtype.isnative:  # other byte orders only look as narrow
        compact = ids.view(dtype)  # of signed ids, -1 is all ones
        wrong = ids.dtype.kind == "u" and unknown.any() and (compact[unknown] != np.iinfo(dtype).max).any()
        if not wrong:
            return compact
    compact = ids.astype(dtype)
    compact[unknown] = np.iinfo(dtype).max
    return compact
