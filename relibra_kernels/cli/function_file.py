"""`FILE.py:FUNCTION`: a policy or a loader of the user's own, from the file that it is in."""

import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..planner.errors import InputError


@dataclass(frozen=True)
class UserFunction:
    name: str
    path: Path
    call: Callable[..., Any]


def load_function(flag: str, text: str) -> UserFunction:
    """Raises: InputError where the file cannot be run, or the function in it is not there."""
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise InputError(f"{flag} is {text!r}, but must be FILE.py:FUNCTION")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"{flag} is {text!r}, but {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"{flag} is {text!r}, but running {path} failed{line_of(error, path)}: {said(error)}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{flag} is {text!r}, but {path} has no such function, only {', '.join(there) or 'none'}")
    return UserFunction(name, path, found)


def said(error: BaseException) -> str:
    """An error's class and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def line_of(error: BaseException, path: Path) -> str:
    """` (my_file.py, line 12)`, the last line of the file that led to the error; empty where none did."""
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()
    ]
    return f" ({path.name}, line {lines[-1]})" if lines else ""
