"""Rows of a large array in a .npz file: read without the rest, written without having been in memory at once."""

import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from .errors import FormatError, ShapeError

_CHUNK_BYTES = 1 << 22


class NpzRows:
    """An array of a .npz file, of which rows are read. A context manager: the file is open within.

    shape, dtype: of the whole array. Raises: FormatError.
    """

    def __init__(self, path: str | os.PathLike[str], key: str):
        self._path, self._key = os.fspath(path), key
        self._archive: zipfile.ZipFile | None = None
        self._file: IO[bytes] | None = None
        self._base = 0
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)
        with self:
            pass

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __enter__(self) -> "NpzRows":
        try:
            self._archive = zipfile.ZipFile(self._path)
            entry = self._archive.getinfo(f"{self._key}.npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                self._file = open(self._path, "rb")  # noqa: PTH123  closed in __exit__
                self._file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", self._file.read(4))
                self._file.seek(entry.header_offset + 30 + name + extra)
            else:
                self._file = self._archive.open(entry)
            version = np.lib.format.read_magic(self._file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_header_2_0
            self.shape, in_columns, self.dtype = read_header(self._file)
            if in_columns or self.dtype.hasobject:
                raise FormatError(f"{self._path}: {self._key!r} is stored in an order that rows cannot be read from")
            self._base = self._file.tell()
        except FormatError:
            self.__exit__(None, None, None)
            raise
        except Exception as error:  # whatever a damaged file makes zipfile and numpy raise
            self.__exit__(None, None, None)
            raise FormatError(f"{self._path}: is damaged or cannot be read: {error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for resource in (self._file, self._archive):
            if resource is not None:
                resource.close()
        self._file = self._archive = None

    def read_into(self, out: np.ndarray, start: int, columns: Sequence[int]) -> None:
        """Fill `out` [n, len(columns), ...] with rows from `start` on."""
        assert self._file is not None, "read within the context"
        row_shape = self.shape[1:]
        row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        try:
            self._file.seek(self._base + start * row_bytes)
            for first in range(0, len(out), step):
                count = min(step, len(out) - first)
                data = self._file.read(count * row_bytes)
                out[first : first + count] = np.frombuffer(data, self.dtype).reshape(count, *row_shape)[:, columns]
        except Exception as error:
            raise FormatError(f"{self._path}: rows from {start} on cannot be read: {error}") from None


class RowSpool:
    """Rows [n, ...] collected in a file without a name, to be written into a .npz once their number is known."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._file = tempfile.TemporaryFile(dir=Path(folder))  # noqa: SIM115  closed with the spool
        self._row_shape: tuple[int, ...] = ()
        self._dtype: np.dtype | None = None
        self._rows = 0

    def append(self, rows: np.ndarray) -> None:
        if self._dtype is None:
            self._dtype, self._row_shape = rows.dtype, rows.shape[1:]
        if (rows.dtype, rows.shape[1:]) != (self._dtype, self._row_shape):
            raise ShapeError(f"rows are {rows.dtype} {rows.shape[1:]}, but were {self._dtype} {self._row_shape} before")
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def write_to(self, member: IO[bytes], stored: np.dtype) -> None:
        """Write as a .npy file, its values read as `stored`."""
        header: dict[str, Any] = {
            "descr": np.lib.format.dtype_to_descr(stored),
            "fortran_order": False,
            "shape": (self._rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(member, header)
        self._file.seek(0)
        shutil.copyfileobj(self._file, member, _CHUNK_BYTES)

    def close(self) -> None:
        self._file.close()


def _read_header_2_0(file: IO[bytes]) -> Any:
    return np.lib.format.read_array_header_2_0(file)
