"""Whether Triton's interpreter works with the numpy that is here."""

import importlib.metadata

from .versions import version_of


def interpreter_fault() -> str:
    """Why it does not; empty where it does, or where Triton is not installed.

    Triton 3.6 makes integers of arrays of one element, which numpy 2.4 and newer refuse.
    """
    if not version_of("triton") or version_of("triton") >= (3, 7) or version_of("numpy") < (2, 4):
        return ""
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    return f"the interpreter of Triton {triton} fails with numpy {numpy}; install numpy<2.4, or Triton 3.7 or newer"
