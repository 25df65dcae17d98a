"""From tensors and a config to a launch: the constants and grids that the GEMM kernels share."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ..configs.config import PARTS_OF_EQUAL_SIZES, BlockConfig, GemmConfig
from ..configs.limits import Device
from ..configs.lookup import config_of
from ..reference.schedule import tile_table
from ..schedule import Schedule
from .launch import precision, target
from .stores import Stores


def ceil_div(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`. Triton's own, which kernels call too, takes ten times as long."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`, which is positive."""
    return 1 << (count - 1).bit_length()


def row_tiles(schedule: Schedule, block_m: int) -> torch.Tensor:
    """The schedule's table for BLOCK_M; made, and kept with it, where it was built without."""
    if block_m not in schedule.tiles:
        schedule.tiles[block_m] = tile_table(schedule.slot_offsets, schedule.num_rows, block_m)
    return schedule.tiles[block_m]


def chosen_config(
    kernel: str,
    tensor: torch.Tensor,
    schedule: Schedule,
    sizes: tuple[int, int],
    *,
    layout: bool,
    interleaved: bool = False,
) -> GemmConfig:
    """The config of a launch that was not given one; sizes (N, D) and layout as in `configs.files.Entry.sizes`."""
    device, rows, slots = target(tensor), schedule.num_rows, schedule.num_slots
    config = config_of(kernel, device, tensor.dtype, sizes, rows, slots, layout, interleaved)
    assert isinstance(config, GemmConfig)
    return config


def chosen_block(
    kernel: str,
    tensor: torch.Tensor,
    width: int,
    num_rows: int,
    *,
    num_slots: int = 1,
    interleaved: bool = False,
    part: str = "",
) -> BlockConfig:
    """As `chosen_config`, of a kernel without tensor cores, over rows of `width` elements.

    Where the rows are fp32 or integers whatever the model's dtype, the config for bf16 is taken.
    """
    assert bool(part) == (kernel in PARTS_OF_EQUAL_SIZES)
    dtype = torch.bfloat16 if kernel in ("replica_reduce", "schedule") else tensor.dtype
    config = config_of(kernel, target(tensor), dtype, (width, 0), num_rows, num_slots, False, interleaved, part)
    assert isinstance(config, BlockConfig)
    return config


def block_of(config: BlockConfig, width: int, item_bytes: int) -> tuple[int, int]:
    """(elements, warps) of a block: no more elements than a row of `width` has, and 16 bytes or more a thread."""
    block = min(config.columns, next_power_of_2(width))
    return block, max(1, min(config.num_warps, block * item_bytes // (32 * 16)))


def grid_of(tensor: torch.Tensor, most_tiles: int, config: GemmConfig) -> tuple[int]:
    """Persistent programs: as many as the device holds at once, a multiple of its chiplets, no more than tiles."""
    device = target(tensor)
    resident = max(device.programs, 1) * config.programs_an_sm
    return (ceil_div(min(resident, most_tiles), device.xcds) * device.xcds,)


def offsets_32(*tensors: torch.Tensor) -> bool:
    """Whether kernels address these with 32-bit offsets: on AMD, whose buffer loads need them, below 2 GiB."""
    small = all(tensor.numel() * tensor.element_size() < 2**31 for tensor in tensors)
    return small and target(tensors[0]).backend == "hip"


def stores_in_halves(tensor: torch.Tensor) -> bool:
    """Whether a tile goes to memory one half after the other: on AMD.

    Its matrix units leave four neighbours in a lane, and Triton would store those 8 bytes as they are. A half is
    exchanged between lanes first, and stored 16 bytes at a time.
    """
    return target(tensor).backend == "hip"


def flat_slots(tensor: torch.Tensor, schedule: Schedule, stores: Stores, *, is_specialised: bool = False) -> int:
    """A power of two of at least as many slots as there are where the loop over tiles is to be flattened, else 0.

    On Hopper, where one block an SM leaves the matrix units idle from a tile's last product to the next one's first: a
    flattened loop loads the next tile's operands during the epilogue, and where warps are specialised, which needs it.
    Not where every tile makes a descriptor.
    """
    flattens = (target(tensor).family == "hopper" or is_specialised) and stores.other is None
    return next_power_of_2(schedule.num_slots) if flattens else 0


def gemm_constants(
    tensor: torch.Tensor,
    config: GemmConfig,
    *,
    widths: tuple[int, ...],
    described: Sequence[torch.Tensor | None],
    gathered_depth: int = 0,
) -> Mapping[str, Any]:
    """How operands are loaded and multiplied.

    Args:
        widths: row lengths of the contiguous operands; descriptors need multiples of 16 bytes.
        described: what descriptors would be made of. A tensor that begins elsewhere than at a multiple of 16 bytes, as
            a view may, has none: then all operands are loaded by pointers.
        gathered_depth: length of the contraction where rows of A are picked by index, else 0.
    """
    aligned = all(base is None or base.data_ptr() % 16 == 0 for base in described)
    dtype = tensor.dtype
    return _constants(
        target(tensor), dtype, config, widths, aligned, gathered_depth, offsets_32(tensor), precision(dtype)
    )


@cache
def _constants(
    device: Device,
    dtype: torch.dtype,
    config: GemmConfig,
    widths: tuple[int, ...],
    is_aligned: bool,
    gathered_depth: int,
    has_offsets_32: bool,
    input_precision: str,
) -> Mapping[str, Any]:
    """`gemm_constants` from all that decides them: made once a layer and kind of batch, not once a launch."""
    aligned = is_aligned and all(width * dtype.itemsize % 16 == 0 for width in widths)
    tma = device.tma and aligned and dtype != torch.float32
    # Triton issue 10927: a descriptor gather gives wrong results on Blackwell where the last block of K is not whole
    whole = gathered_depth % config.block_k == 0
    pointer = "pointer32" if has_offsets_32 else "pointer"
    gathered = "gather" if tma and device.descriptor_gather and whole else pointer
    return {
        "TMA": tma,
        "A_MODE": gathered if gathered_depth else ("tma" if tma else pointer),
        "PRECISION": input_precision,
        "UPCAST": device.interpreted and dtype == torch.bfloat16,
        "XCDS": device.xcds,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
