"""All launches of a device, compiled one after the other."""

from collections.abc import Iterator

import torch

from .catalogue import gemm_calls, other_calls, recorded
from .compile_only import Report, compile_launch
from .configs import SPACE, configs
from .limits import Device

KERNELS = (*SPACE, "schedule", "permute", "swiglu", "replica_reduce", "grad_bias")


def reports(
    device: Device, dtype: torch.dtype, kernel: str | None = None, *, first_only: bool = False
) -> Iterator[tuple[str, str, str, Report]]:
    """(kernel, config, variant, report) of everything that the library can launch on `device` in `dtype`."""
    for name in SPACE:
        if kernel in (None, name):
            for number, config in enumerate(configs(name, device, dtype)[: 1 if first_only else None]):
                for variant, call in gemm_calls(name, config, dtype):
                    # what a kernel launches besides does not depend on its config
                    for launch in recorded(device, call)[: None if number == 0 else 1]:
                        yield name, str(config), variant, compile_launch(launch, device)
    if kernel is None or kernel not in SPACE:
        for name, variant, call in other_calls(dtype):
            if kernel in (None, name):
                for launch in recorded(device, call):
                    report = compile_launch(launch, device)
                    yield name, "-", f"{variant}: {report.kernel}", report
