"""Arrays that travel as bytes, base64 or .npy files. Whatever is wrong with them is a FormatError."""

import base64
import binascii
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FormatError

ID_DTYPES = ("uint8", "uint16", "int8", "int16", "int32", "int64")


def named_dtype(value: Any, what: str) -> str:
    """The dtype that a payload says its ids have. Raises: FormatError."""
    text = str(value).rpartition(".")[2]  # "torch.uint8", "numpy.uint8"
    if text not in ID_DTYPES:
        raise FormatError(f"{what} starts with the dtype {value!r}, but must be one of {', '.join(ID_DTYPES)}")
    return text


def decode_base64(text: Any, what: str) -> bytes:
    """The bytes behind `text`; bytes are taken as they are. Raises: FormatError."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise FormatError(f"{what} is not base64: {error}") from None


def array_of_bytes(data: bytes, dtype: str | type[np.integer], shape: Sequence[int], what: str) -> np.ndarray:
    """`data` as a little-endian array of that shape; one entry of `shape` may be -1. Raises: FormatError."""
    size = np.dtype(dtype).itemsize
    known = math.prod(n for n in shape if n >= 0)
    fits = known and len(data) % (known * size) == 0 if -1 in shape else len(data) == known * size
    if not fits or min(shape, default=0) < -1:
        raise FormatError(
            f"{what} has {len(data)} bytes, which do not make {np.dtype(dtype).name} of shape "
            f"[{', '.join('rows' if n == -1 else str(n) for n in shape)}]"
        )
    array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    return array.reshape(shape).astype(np.dtype(dtype), copy=False)


def array_of_npy(data: bytes, what: str) -> np.ndarray:
    """The array of a .npy file. Raises: FormatError."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header raises a dozen kinds, of the tokenizer too
        raise FormatError(f"{what} is not the base64 of a .npy file: {error}") from None
    if not isinstance(array, np.ndarray):
        raise FormatError(f"{what} is an archive, but must be one .npy array")
    return array
