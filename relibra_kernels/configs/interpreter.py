"""Whether Triton's interpreter works with the numpy that is here."""

import importlib.metadata
import re
from functools import cache


@cache
def interpreter_fault() -> str:
    """Why it does not; empty where it does, or where Triton is not installed.

    Triton 3.6 makes integers of arrays of one element, which numpy 2.4 and newer refuse.
    """
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return ""
    if _numbers(triton) >= (3, 7) or _numbers(numpy) < (2, 4):
        return ""
    return f"the interpreter of Triton {triton} fails with numpy {numpy}; install numpy<2.4, or Triton 3.7 or newer"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])
