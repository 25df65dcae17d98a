"""What is compiled for a device: all launches with the configs that need no search, and what a search tries."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..compiling.compile_only import Report, compile_launch, launch_digest
from ..configs.config import GEMM_KERNELS, Config
from ..configs.limits import Device
from ..configs.spaces import SPACE, candidates, configs
from ..kernels.launch import Launch
from .catalogue import OSS, PARTS, QWEN, REPLICAS, calls, recorded
from .compile_task import Task

KERNELS = tuple(SPACE)


def reports(
    device: Device,
    dtype: torch.dtype,
    kernel: str | None,
    *,
    first_only: bool,
    dump: Path | None,
) -> Iterator[tuple[str, str, str, Report]]:
    """(kernel, config, variant, report) of everything that the library launches on `device` in `dtype` untuned.

    Args:
        kernel: only this one; None: all.
        first_only: one config a kernel, the one that large batches get.
        dump: a folder, in which every compilation keeps its texts in a folder of its own.
    """
    for name in KERNELS if kernel is None else (kernel,):
        for number, config in enumerate(configs(name, device, dtype)[: 1 if first_only else None]):
            for variant, call in calls(name, config, dtype):
                # what a GEMM launches besides does not depend on its config
                besides = number == 0 or name not in GEMM_KERNELS
                for launch in recorded(device, call)[: None if besides else 1]:
                    place = None if dump is None else dump / _folder(device, name, config, variant, launch)
                    report = compile_launch(launch, device, dump=place)
                    yield name, str(config), variant, report


def candidate_tasks(
    device: Device, kernel: str | None = None, *, sample: int | None = None, seed: str = ""
) -> list[Task]:
    """Of the GEMMs, or of `kernel` alone, all that a search tries on `device`, with two stores of weights.

    Kernels without tensor cores have none: they cut their blocks to a row, so that several are one where it is short.

    Args:
        sample: only so many launches (a part of a layer, with weights of one layout), chosen by `seed`.
    """
    names = [name for name in GEMM_KERNELS if kernel in (None, name)]
    launches = [(name, part, sizes) for name in names for part in PARTS[name] for sizes in (QWEN, OSS)]
    launches.sort(key=lambda launch: hashlib.sha256(f"{seed} {device.name} {launch}".encode()).digest())
    return [
        Task(device.name, name, part, str(config), *sizes, REPLICAS)
        for name, part, sizes in launches[:sample]
        for config in candidates(name, device, torch.bfloat16)
    ]


def _folder(device: Device, name: str, config: Config, variant: str, launch: Launch) -> str:
    """The name of one compilation's folder: what it compiles, in words, and its digest."""
    of = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return "-".join((device.name, name, str(config), *re.findall(r"[\w.]+", variant), of, launch_digest(launch)))
