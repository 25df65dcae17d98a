"""The most memory that a piece of work has beyond what there was before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin_peak(device: torch.device) -> Callable[[], int | None]:
    """Begin to watch; what is returned says the peak in bytes so far, None where this system does not tell.

    On a GPU the allocator counts. On a CPU it is what the process has resident, which Linux tells; memory that is free,
    but still the process's, is given back first, since the work would take it without a trace.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - allocated
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
    except (OSError, AttributeError, ValueError):
        return lambda: None
    return lambda: max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {name}")
