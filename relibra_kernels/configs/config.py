"""What a config is, how it is written, and which devices it fits. Which ones there are: `spaces.py`."""

import re
from dataclasses import dataclass

import torch

from ..planner.errors import InputError
from .limits import Device
from .versions import version_of

GEMM_KERNELS = ("gate_up", "grouped_gemm", "grad_hidden", "grad_weight")
ROW_KERNELS = ("permute", "swiglu", "replica_reduce", "grad_bias", "schedule")
# Raised when a kernel changes so much that what was found for the one before says nothing about it. 1 where not named.
GENERATIONS = {"grad_hidden": 3, "grad_weight": 3}
PARTS_OF_EQUAL_SIZES = ("permute", "swiglu")  # their launches say which part they are

_GEMM = re.compile(r"(\d{1,4})x(\d{1,4})x(\d{1,4})w(\d{1,2})s(\d{1,2})(?:g(\d{1,3}))?(ws)?")
_BLOCK = re.compile(r"(?:(\d{1,4})x)?(\d{1,5})w(\d{1,2})")
_USUAL_GROUP = 8
_SPECIALISED = ("grouped_gemm",)  # kernels whose operands all come by descriptors
_SPECIALISING = (3, 9)  # the first Triton that does it without spills
_MOST_ELEMENTS = 16384  # of a block: beyond it no device has the registers


@dataclass(frozen=True)
class GemmConfig:
    """How a grouped GEMM is launched.

    Attributes:
        block_m, block_n: rows and columns of the tile that a program computes; of a weight gradient, of the weight.
        block_k: how much of the contraction is multiplied in one step.
        num_warps: warps of a program.
        num_stages: steps whose operands are loaded ahead: the depth of the pipeline.
        group_m: row tiles that go through all columns together, so that they share what the cache holds.
        is_specialised: loads and products each have warps of their own besides the `num_warps` that store, and there
            are two accumulators: a tile is stored while the next one is multiplied.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = _USUAL_GROUP
    is_specialised: bool = False

    def __str__(self) -> str:
        group = "" if self.group_m == _USUAL_GROUP else f"g{self.group_m}"
        end = group + ("ws" if self.is_specialised else "")
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.num_warps}s{self.num_stages}{end}"

    @property
    def programs_an_sm(self) -> int:
        """Persistent programs that are started for every SM."""
        return 1 if self.is_specialised else max(1, 8 // self.num_warps)


@dataclass(frozen=True)
class BlockConfig:
    """How a kernel without tensor cores is launched.

    Attributes:
        columns: elements of a row that a program works on at a time; for the schedule kernel, assignments.
        num_warps: warps of a program.
        rows: rows that a program works on at a time: more than one for grad_bias only.
    """

    columns: int
    num_warps: int
    rows: int = 1

    def __str__(self) -> str:
        return ("" if self.rows == 1 else f"{self.rows}x") + f"{self.columns}w{self.num_warps}"


Config = GemmConfig | BlockConfig


def parse_config(text: str) -> Config:
    """The config that `text` stands for. Raises: InputError where it stands for none.

    `128x256x64w8s3` is a GemmConfig: block_m x block_n x block_k, warps, stages; `g4` at the end is a group_m
    other than 8, `ws` after it specialised warps. `2048w8` is a BlockConfig: columns, warps; `32x128w4` has 32 rows
    in front.
    """
    gemm = _GEMM.fullmatch(text)
    if gemm is not None:
        *sizes, specialised = gemm.groups(default=str(_USUAL_GROUP))
        m, n, k, num_warps, stages, group = map(int, sizes)
        return GemmConfig(m, n, k, num_warps, stages, group, is_specialised=specialised == "ws")
    found = _BLOCK.fullmatch(text)
    if found is None:
        raise InputError(
            f"config is {text!r}; it must be like 128x256x64w8s3 or 128x256x64w8s3g4, of kernels without tensor cores "
            "like 2048w8 or 32x128w4"
        )
    rows, columns, warps = found.groups()
    return BlockConfig(int(columns), int(warps), int(rows or 1))


def row_blocks(device: Device) -> tuple[int, ...]:
    """Every block_m that a launch may choose. A schedule has a table of tiles for each."""
    return (16,) if device.interpreted else (64, 128)


def misfit(kernel: str, config: Config, device: Device, dtype: torch.dtype) -> str:
    """Why `config` cannot be used for `kernel` on `device`; empty where nothing speaks against it."""
    if isinstance(config, GemmConfig) != (kernel in GEMM_KERNELS):
        return f"{kernel} takes configs like {'128x256x64w8s3' if kernel in GEMM_KERNELS else '2048w8'}"
    warps = config.num_warps
    if warps < 1 or warps & (warps - 1) or warps * device.warp_size > 1024:
        return f"num_warps is {warps}; it must be a power of two, {1024 // device.warp_size} at most"
    if isinstance(config, BlockConfig):
        return _block_misfit(kernel, config)
    blocks = {"block_m": config.block_m, "block_n": config.block_n, "block_k": config.block_k}
    for name, size in blocks.items():
        if size < 16 or size & (size - 1):
            return f"{name} is {size}; it must be a power of two, 16 at least"
    if config.num_stages < 1 or config.group_m < 1:
        return f"num_stages is {config.num_stages} and group_m {config.group_m}; both must be 1 at least"
    if kernel != "grad_weight" and config.block_m not in row_blocks(device):
        return f"block_m is {config.block_m}; schedules have tiles of {' and '.join(map(str, row_blocks(device)))} rows"
    if config.is_specialised and (fault := _specialised_misfit(kernel, device)):
        return fault
    elements = (config.block_m + accumulators(kernel) * config.block_n) * config.block_k
    shared_bytes = elements * dtype.itemsize * max(config.num_stages - device.stages_in_registers, 1)
    if shared_bytes > device.shared_bytes:
        return f"its tiles take {shared_bytes} bytes of shared memory; {device.name} has {device.shared_bytes}"
    return ""


def _specialised_misfit(kernel: str, device: Device) -> str:
    if kernel not in _SPECIALISED:
        return f"ws gives loads and products warps of their own; {kernel} has none, only {', '.join(_SPECIALISED)}"
    if device.family != "blackwell":
        return f"ws gives loads and products warps of their own; {device.name} must be of Blackwell"
    here, needed = version_of("triton"), _SPECIALISING
    if here < needed:
        return f"ws needs Triton {'.'.join(map(str, needed))}; this is {'.'.join(map(str, here)) or 'none'}"
    return ""


def _block_misfit(kernel: str, config: BlockConfig) -> str:
    for name, size, least in (("columns", config.columns, 32), ("rows", config.rows, 1)):
        if size < least or size & (size - 1):
            return f"{name} is {size}; it must be a power of two, {least} at least"
    if config.rows > 1 and kernel != "grad_bias":
        return f"rows is {config.rows}; {kernel} takes one row at a time"
    if config.rows * config.columns > _MOST_ELEMENTS:
        return f"its block has {config.rows * config.columns} elements; it must have {_MOST_ELEMENTS} at most"
    return ""


def accumulators(kernel: str) -> int:
    """How many accumulators of block_n columns a tile has."""
    return 2 if kernel == "gate_up" else 1
