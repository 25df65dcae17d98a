"""Reading what engines wrote to disk: folders of .npy files and JSON lines, one after the other. Never a pickle."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError


def read_arrays(folder: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The arrays of all `.npy` files in a folder, in the order of their names. Raises: FormatError."""
    paths = sorted(path for path in _listed(Path(folder)) if path.suffix == ".npy")
    if not paths:
        raise FormatError(f"{folder}: holds no .npy file, but must hold one for each sequence")
    return map(_read_array, paths)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises: FormatError."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {_reason(error)}") from None


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a file with one JSON value a line; empty lines are skipped. Raises: FormatError."""
    found = False
    try:
        with Path(path).open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield number, _parse(line, path, number)
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as JSON lines: {_reason(error)}") from None
    if not found:
        raise FormatError(f"{path}: holds no line")


def _parse(line: str, path: str | os.PathLike[str], number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: line {number} is not JSON: {getattr(error, 'msg', error)}") from None


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read as a folder: {_reason(error)}") from None


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged header raises a dozen kinds, of the tokenizer too
        raise FormatError(f"{path}: is not a .npy file that can be read: {_reason(error)}") from None
    if not isinstance(array, np.ndarray):
        raise FormatError(f"{path}: is an archive, but must be one array")
    return array


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
