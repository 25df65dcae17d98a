"""Reading and writing .npz files: never a pickle, never half a file."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from .errors import FormatError, ReLibraError

Writer = Callable[[IO[bytes]], None]  # writes one .npy file


def save_npz(path: str | os.PathLike[str], **arrays: np.ndarray | Writer) -> None:
    """Write `arrays` under exactly this name, or leave what was there: a temporary file beside it is renamed.

    The same arrays give the same bytes. An array that was never in memory at once is given as its writer.
    """
    with written_whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        for key, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                if callable(array):
                    array(member)
                else:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write into, which takes the place of `path` when the block ends; where it fails, nothing does.

    Raises: FormatError where `path` is no file, or its folder cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise FormatError(f"{target}: is not a file, and only a file is replaced")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise FormatError(f"{target}: cannot be written: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_npz(
    path: str | os.PathLike[str], required: Iterable[str] = (), optional: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """The named arrays of a .npz file. Whatever is wrong with the file is a FormatError that names it."""
    name = os.fspath(path)
    required = tuple(required)
    npz_keys(name)  # says so where it is no archive at all
    try:
        archive = np.load(name, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise FormatError(f"{name}: is not a .npz archive")
        with archive:
            missing = [key for key in required if key not in archive.files]
            if missing:
                raise FormatError(f"{name}: has no array {missing[0]!r}, only {sorted(archive.files)}")
            arrays = {key: archive[key] for key in (*required, *optional) if key in archive.files}
    except ReLibraError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy raise a dozen kinds
        if "pickle" in str(error).lower():
            raise FormatError(f"{name}: holds pickled objects, which are never loaded") from None
        raise FormatError(f"{name}: is damaged or cannot be read: {error}") from None
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # a member that is no .npy file comes as bytes
            raise FormatError(f"{name}: {key!r} is no array")
    return arrays


def npz_keys(path: str | os.PathLike[str]) -> set[str]:
    """The names of the arrays in a .npz file, without reading them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {entry.removesuffix(".npy") for entry in archive.namelist()}
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise FormatError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None
    except Exception as error:
        raise FormatError(f"{os.fspath(path)}: is damaged or not a .npz archive: {error}") from None


def scalar(arrays: dict[str, np.ndarray], key: str, path: str | os.PathLike[str]) -> Any:
    """The single value of array `key`."""
    value = arrays[key]
    if value.size != 1:
        raise FormatError(f"{os.fspath(path)}: {key!r} has shape {value.shape}, but must be a single value")
    return value.reshape(())[()]
