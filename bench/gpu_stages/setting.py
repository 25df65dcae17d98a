"""Where a case runs: the GPU with a real clock, or, in a rehearsal, Triton's interpreter with sizes to match."""

from pathlib import Path
from typing import Any, TypeVar

import torch

from .clock import FakeClock, GpuClock
from .worker import Report

T = TypeVar("T")


class Setting:
    """Attributes:
    name: the device's. device: of tensors. clock: times calls.
    report: takes figures. known: the figures of the case `peaks`, where it ran. work: a folder for files.
    """

    def __init__(self, report: Report, rehearse: bool, known: dict[str, Any], work: Path) -> None:
        self.report, self.rehearse, self.known, self.work = report, rehearse, known, work
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.name = "rehearsal" if rehearse else torch.cuda.get_device_name()
        self.clock: FakeClock | GpuClock = FakeClock() if rehearse else GpuClock()
        torch.manual_seed(0)

    def size(self, real: T, tiny: T) -> T:
        """Of a rehearsal: the tiny one."""
        return tiny if self.rehearse else real

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)
