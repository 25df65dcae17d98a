"""Arrays that travel as bytes or base64."""

import base64
import binascii
from collections.abc import Sequence

import numpy as np

from ..errors import FormatError


def decode_base64(text: str, what: str) -> bytes:
    """The bytes behind `text`. Raises: FormatError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise FormatError(f"{what} is not base64: {error}") from None


def array_of_bytes(data: bytes, dtype: str | type[np.integer], shape: Sequence[int], what: str) -> np.ndarray:
    """`data` as a little-endian array of that shape; one entry of `shape` may be -1. Raises: FormatError."""
    array = np.frombuffer(data[: len(data) - len(data) % np.dtype(dtype).itemsize], np.dtype(dtype).newbyteorder("<"))
    known = int(np.prod([size for size in shape if size >= 0]))
    fits = array.size % known == 0 if known and -1 in shape else array.size == known
    if array.nbytes != len(data) or not fits or min(shape, default=0) < -1:
        raise FormatError(
            f"{what} has {len(data)} bytes, which do not make {np.dtype(dtype).name} of shape "
            f"[{', '.join('rows' if size == -1 else str(size) for size in shape)}]"
        )
    return array.reshape(shape).astype(np.dtype(dtype), copy=False)
