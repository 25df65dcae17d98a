"""The kernels of the package that are launched by themselves."""

import importlib
import pkgutil

from triton.runtime.jit import JITFunction

from relibra_kernels import kernels


def entry_kernels():
    """Their names; other `@triton.jit` functions are called by these."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        members = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        found |= {n for n, kernel in members.items() if isinstance(kernel, JITFunction) and n.endswith("_kernel")}
    return found
