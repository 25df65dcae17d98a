"""Tile sizes of the GEMM kernels: which ones each device may be given."""

import re
from dataclasses import dataclass

import torch

from ..planner.errors import InputError
from .limits import Device

_PATTERN = re.compile(r"(\d{1,4})x(\d{1,4})x(\d{1,4})w(\d{1,2})s(\d{1,2})(?:g(\d{1,3}))?")
_USUAL_GROUP = 8


@dataclass(frozen=True)
class GemmConfig:
    """Attributes: rows, columns and contraction of a tile (weight gradients: the first two are of the weight); how many
    warps compute it; how many loads are in flight; how many row tiles go through all columns together.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = _USUAL_GROUP

    def __str__(self) -> str:
        group = "" if self.group_m == _USUAL_GROUP else f"g{self.group_m}"
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.num_warps}s{self.num_stages}{group}"


def parse_config(text: str) -> GemmConfig:
    """The config that is written so: `128x256x64w8s3`, with `g4` at the end where groups are not of 8 row tiles."""
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise InputError(f"config is {text!r}; it must be like 128x256x64w8s3 or 128x256x64w8s3g4")
    return GemmConfig(*(int(number) for number in found.groups() if number is not None))


def _all(*sizes: tuple[int, int, int, int, int]) -> list[GemmConfig]:
    return [GemmConfig(*size) for size in sizes]


# kernel -> the configs worth having for 2-byte types, the one for large batches first.
# (block_m, block_n, block_k, warps, stages); gate_up computes twice block_n columns.
SPACE = {
    "grouped_gemm": _all(
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 2),
        (64, 128, 64, 4, 4),
        (64, 128, 64, 4, 2),
        (64, 64, 32, 4, 2),
    ),
    "gate_up": _all(
        (128, 128, 64, 8, 3),
        (128, 64, 64, 8, 4),
        (128, 64, 64, 8, 2),
        (64, 128, 64, 8, 3),
        (64, 64, 64, 4, 3),
        (64, 64, 64, 4, 2),
        (64, 32, 32, 4, 2),
    ),
    "grad_hidden": _all(
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 2),
        (128, 64, 64, 8, 3),
        (64, 128, 64, 8, 3),
        (64, 128, 64, 8, 2),
        (64, 64, 64, 4, 3),
        (64, 64, 32, 4, 2),
    ),
    "grad_weight": _all(
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 3),
        (64, 128, 64, 8, 3),
        (64, 128, 64, 4, 2),
        (64, 64, 32, 4, 2),
    ),
}

# fp32 is exact and slow: no tensor cores
SPACE_FP32 = {
    "grouped_gemm": _all((64, 64, 32, 4, 2)),
    "gate_up": _all((64, 32, 32, 4, 2)),
    "grad_hidden": _all((64, 64, 32, 4, 2)),
    "grad_weight": _all((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
}

# (family, kernel) -> configs for 2-byte types that spill registers or need more shared memory than there is, as
# `relibra compile` shows
EXCLUDED: dict[tuple[str, str], list[GemmConfig]] = {
    ("ampere", "gate_up"): _all((128, 128, 64, 8, 3)),
    ("blackwell", "gate_up"): _all((128, 128, 64, 8, 3)),
    ("blackwell", "grouped_gemm"): _all((64, 64, 32, 4, 2)),
}

# What a search tries besides. Most of it spills or does not fit on one device or another.
WIDER = {
    "grouped_gemm": _all(
        (128, 256, 64, 8, 4),
        (128, 256, 64, 8, 2),
        (128, 128, 128, 8, 2),
        (128, 128, 64, 4, 3),
        (128, 64, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 256, 64, 8, 3),
        (64, 256, 64, 4, 3),
        (64, 128, 128, 4, 2),
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 4),
    ),
    "gate_up": _all(
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 4),
        (128, 64, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 8, 2),
        (64, 128, 64, 4, 3),
        (64, 64, 128, 4, 2),
        (64, 64, 64, 4, 4),
    ),
    "grad_hidden": _all(
        (128, 128, 64, 8, 4),
        (128, 128, 32, 8, 4),
        (128, 128, 32, 8, 2),
        (128, 64, 64, 8, 2),
        (128, 64, 64, 4, 3),
        (64, 256, 64, 8, 2),
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 64, 64, 4, 2),
    ),
    "grad_weight": _all(
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 2),
        (256, 128, 64, 8, 2),
        (128, 128, 128, 8, 2),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 2),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 3),
    ),
}
_MOST_ACCUMULATORS = 160  # fp32 a thread; beyond it everything spills

INTERPRETED = GemmConfig(16, 16, 16, 4, 1)


def row_blocks(device: Device) -> tuple[int, ...]:
    """The block_m that `config_for` may choose: a schedule comes with these tables of tiles."""
    return (INTERPRETED.block_m,) if device.interpreted else (64, 128)


def configs(kernel: str, device: Device, dtype: torch.dtype) -> list[GemmConfig]:
    """What `kernel` may be given on `device`: everything here compiles without spills and fits."""
    if device.interpreted:
        return [INTERPRETED]
    if dtype == torch.float32:
        space, excluded = SPACE_FP32[kernel], []
    else:
        space, excluded = SPACE[kernel], EXCLUDED.get((device.family, kernel), [])
    return [config for config in space if config not in excluded and not misfit(kernel, config, device, dtype)]


def candidates(kernel: str, device: Device, dtype: torch.dtype) -> list[GemmConfig]:
    """What a search tries: all that fits by its sizes. What spills is known when it is compiled."""
    space = SPACE_FP32[kernel] if dtype == torch.float32 else SPACE[kernel] + WIDER[kernel]

    def accumulators(config: GemmConfig) -> int:
        return _width(kernel) * config.block_m * config.block_n // (config.num_warps * device.warp_size)

    few = [config for config in space if accumulators(config) <= _MOST_ACCUMULATORS]
    return [config for config in few if not misfit(kernel, config, device, dtype)]


def misfit(kernel: str, config: GemmConfig, device: Device, dtype: torch.dtype) -> str:
    """Why `config` cannot be used for `kernel` on `device`; empty where nothing speaks against it."""
    blocks = {"block_m": config.block_m, "block_n": config.block_n, "block_k": config.block_k}
    for name, size in blocks.items():
        if size < 16 or size & (size - 1):
            return f"{name} is {size}; it must be a power of two, 16 at least"
    warps = config.num_warps
    if warps < 1 or warps & (warps - 1) or warps * device.warp_size > 1024:
        return f"num_warps is {warps}; it must be a power of two, {1024 // device.warp_size} at most"
    if config.num_stages < 1 or config.group_m < 1:
        return f"num_stages is {config.num_stages} and group_m {config.group_m}; both must be 1 at least"
    if kernel != "grad_weight" and config.block_m not in row_blocks(device):
        return f"block_m is {config.block_m}; schedules have tiles of {' and '.join(map(str, row_blocks(device)))} rows"
    elements = (config.block_m + _width(kernel) * config.block_n) * config.block_k
    shared_bytes = elements * dtype.itemsize * max(config.num_stages - device.stages_in_registers, 1)
    if shared_bytes > device.shared_bytes:
        return f"its tiles take {shared_bytes} bytes of shared memory; {device.name} has {device.shared_bytes}"
    return ""


def _width(kernel: str) -> int:
    """How many accumulators of block_n columns a tile has."""
    return 2 if kernel == "gate_up" else 1


def config_for(kernel: str, device: Device, dtype: torch.dtype, num_rows: int, num_slots: int) -> GemmConfig:
    """A config always, at once, without a search: small row tiles where slots have few rows."""
    choice = configs(kernel, device, dtype)
    if kernel != "grad_weight" and num_rows < 96 * num_slots:
        choice = [config for config in choice if config.block_m <= 64] or choice
    return choice[0]
