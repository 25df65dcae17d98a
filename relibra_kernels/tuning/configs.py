"""Tile sizes of the GEMM kernels: which ones each device may be given."""

from dataclasses import dataclass

import torch

from .limits import Device


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
    group_m: int = 8

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.num_warps}s{self.num_stages}"


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
    "grouped_gemm": _all((64, 64, 32, 4, 2), (32, 64, 32, 4, 2)),
    "gate_up": _all((64, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
    "grad_hidden": _all((64, 64, 32, 4, 2), (32, 64, 32, 4, 2)),
    "grad_weight": _all((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
}

# (family, kernel) -> configs that spill registers or need more shared memory than there is, as `relibra compile` shows
EXCLUDED: dict[tuple[str, str], list[GemmConfig]] = {
    ("ampere", "gate_up"): _all((128, 128, 64, 8, 3)),
    ("blackwell", "gate_up"): _all((128, 128, 64, 8, 3)),
    ("blackwell", "grouped_gemm"): _all((64, 64, 32, 4, 2)),
}

INTERPRETED = GemmConfig(16, 16, 16, 4, 1)


def row_blocks(device: Device) -> tuple[int, ...]:
    """The block_m that `config_for` may choose: a schedule comes with these tables of tiles."""
    return (INTERPRETED.block_m,) if device.interpreted else (64, 128)


def configs(kernel: str, device: Device, dtype: torch.dtype) -> list[GemmConfig]:
    """What `kernel` may be given on `device`: everything here compiles without spills and fits."""
    if device.interpreted:
        return [INTERPRETED]
    space = (SPACE_FP32 if dtype == torch.float32 else SPACE)[kernel]
    excluded = EXCLUDED.get((device.family, kernel), [])
    width = 2 if kernel == "gate_up" else 1

    def shared_bytes(config: GemmConfig) -> int:
        elements = (config.block_m + width * config.block_n) * config.block_k
        return elements * dtype.itemsize * max(config.num_stages - device.stages_in_registers, 1)

    return [config for config in space if config not in excluded and shared_bytes(config) <= device.shared_bytes]


def config_for(kernel: str, device: Device, dtype: torch.dtype, num_rows: int, num_slots: int) -> GemmConfig:
    """A config always, at once, without a search: small row tiles where slots have few rows."""
    choice = configs(kernel, device, dtype)
    if kernel != "grad_weight" and num_rows < 96 * num_slots:
        choice = [config for config in choice if config.block_m <= 64] or choice
    return choice[0]
