"""Inputs to time kernels on: layers with a goal's group sizes, as often as it takes to exceed the L2 cache."""

import re
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import triton

from .. import kernels
from ..configs.config import Config
from ..schedule import Schedule
from .catalogue import Layer
from .measure import Timing
from .search_goal import Goal

_MOST_COPIES = 16


def prepare(goal: Goal) -> list["RotatingWorkload"]:
    """The goal's inputs on the current GPU."""
    device = torch.device("cuda")
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return [RotatingWorkload(goal, rows, device, l2) for rows in goal.groups]


def bench(call: Callable[[], object]) -> Timing:
    """Triton's own benchmark: L2 is cleared before every launch."""
    median, low, high = triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8])
    return Timing(1e3 * median, 1e3 * low, 1e3 * high)


def driver_version() -> str:
    """The version of the GPU's kernel driver, or of the runtime where the driver does not tell."""
    if torch.version.hip:
        path, pattern = Path("/sys/module/amdgpu/version"), r"(\S+)"
    else:
        path, pattern = Path("/proc/driver/nvidia/version"), r"Module[^\d]*([\d.]+)"
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found.group(1) if found else f"unknown, runtime {torch.version.hip or torch.version.cuda}"


def schedule_of(rows: np.ndarray, top_k: int, device: torch.device) -> Schedule:
    """A schedule with these group sizes, assignments in a random but fixed order."""
    slots = torch.repeat_interleave(torch.arange(len(rows)), torch.from_numpy(rows))
    total = max(-(-len(slots) // top_k), 1) * top_k
    ids = torch.full((total,), -1, dtype=torch.int64)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    ids[order[: len(slots)]] = slots
    return kernels.build_schedule(ids.view(-1, top_k).to(device), len(rows), num_rows=len(slots))


class RotatingWorkload:
    """One group table of a goal: the launch on one copy of its inputs after the other, twice L2 together."""

    def __init__(self, goal: Goal, rows: np.ndarray, device: torch.device, l2_bytes: int) -> None:
        model, made = goal.model, 0

        def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            nonlocal made
            tensor = torch.randn(shape, device=device, dtype=dtype)
            made += tensor.numel() * tensor.element_size()
            return tensor

        schedule = schedule_of(rows * model.top_k if goal.kernel == "permute" else rows, model.top_k, device)
        accumulate = goal.kernel == "grad_weight"
        layer = Layer(
            model.hidden_size, model.intermediate_size, model.form, schedule, accumulate=accumulate, make=make
        )
        self.calls = [layer.call(goal.kernel, goal.part, None)]
        copies = min(2 * l2_bytes // max(made, 1) + 1, _MOST_COPIES)
        self.calls += [layer.call(goal.kernel, goal.part, None) for _ in range(copies - 1)]
        self.restore()

    def call(self, config: Config) -> Callable[[], object]:
        calls = cycle([partial(call, config=config) for call in self.calls])
        return lambda: next(calls)()

    def restore(self) -> None:
        """Sums start from zero: adding to them again and again must not overflow."""
        for call in self.calls:
            if "grad" in call.keywords:
                call.keywords["grad"].zero_()
