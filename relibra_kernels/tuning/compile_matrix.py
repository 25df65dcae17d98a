"""All launches of a device, compiled one after the other."""

from collections.abc import Iterator

import torch

from ..compiling.compile_only import Report, compile_launch
from ..configs.config import GEMM_KERNELS
from ..configs.limits import Device
from ..configs.spaces import SPACE, configs
from .catalogue import calls, recorded

KERNELS = tuple(SPACE)


def reports(
    device: Device, dtype: torch.dtype, kernel: str | None = None, *, first_only: bool = False
) -> Iterator[tuple[str, str, str, Report]]:
    """(kernel, config, variant, report) of everything that the library launches on `device` in `dtype` untuned."""
    for name in KERNELS if kernel is None else (kernel,):
        for number, config in enumerate(configs(name, device, dtype)[: 1 if first_only else None]):
            for variant, call in calls(name, config, dtype):
                # what a GEMM launches besides does not depend on its config
                besides = number == 0 or name not in GEMM_KERNELS
                for launch in recorded(device, call)[: None if besides else 1]:
                    report = compile_launch(launch, device)
                    yield name, str(config), variant, report
