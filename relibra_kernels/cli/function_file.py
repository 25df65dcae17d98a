"""`FILE.py:FUNCTION`: a policy or a loader of the user's own, from the file that it is in."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..planner.errors import InputError


def load_function(flag: str, text: str) -> tuple[str, Callable[..., Any]]:
    """(its name, the function). Raises: InputError where the file or the function in it is not there."""
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise InputError(f"{flag} is {text!r}, but must be FILE.py:FUNCTION")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"{flag} is {text!r}, but {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{flag} is {text!r}, but {path} has no such function, only {', '.join(there) or 'none'}")
    return name, found
