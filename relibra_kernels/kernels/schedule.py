"""The tables of `Schedule`, built on the device in three launches without waiting for it, or in one."""

import os
from collections.abc import Sequence

import torch

from ..configs.config import BlockConfig, row_blocks
from ..planner.errors import InputError
from ..schedule import Schedule, Splits, check_slot_of_assignment, check_splits, tile_bound
from .constants import ceil_div, chosen_block, next_power_of_2
from .launch import launch, target
from .schedule_kernels import _count_kernel, _scan_kernel, _scatter_kernel, _schedule_kernel

MOST_SLOTS = 512  # a row of counts is one vector
MOST_COUNTED = 1 << 16  # assignments that every block counts by itself: 4096 tokens with up to 16 experts each
COUNTED = 2048  # of them at a time


def counting_block(config: BlockConfig) -> tuple[int, int]:
    """(assignments, warps) of a block that counts all assignments by itself.

    What spills no registers: blocks of 4096 keys do, and so do tables of splits in four warps.
    """
    return config.columns if config.columns <= 2048 else 1024, 2 * config.num_warps


def build_schedule(
    slot_of_assignment_TK: torch.Tensor,
    num_slots: int,
    block_sizes: Sequence[int] = (),
    *,
    num_rows: int | None = None,
    config: BlockConfig | None = None,
) -> Schedule:
    """The tables of `Schedule` for slots in `-1 .. num_slots-1` (-1 = dropped); others are dropped too.

    Tables of tiles come for `block_sizes` and for what the GEMMs choose. `RELIBRA_DEBUG=1` checks the range on the
    device and stops the program where it is broken.

    Args:
        num_rows: how many assignments are not dropped, where the host knows it; None: buffers have T*K rows.
    """
    return _build(slot_of_assignment_TK, num_slots, num_slots, None, block_sizes, num_rows, config)


def build_split_schedule(
    expert_of_assignment_TK: torch.Tensor,
    splits: Splits,
    num_slots: int,
    block_sizes: Sequence[int] = (),
    *,
    num_rows: int | None = None,
    config: BlockConfig | None = None,
) -> Schedule:
    """The same for experts whose assignments go to several slots by cumulative quota: see `Splits`."""
    check_splits(splits, num_slots)
    return _build(expert_of_assignment_TK, len(splits.slot_EP), num_slots, splits, block_sizes, num_rows, config)


def _build(
    ids_TK: torch.Tensor,
    num_keys: int,
    num_slots: int,
    splits: Splits | None,
    block_sizes: Sequence[int],
    num_rows: int | None,
    config: BlockConfig | None,
) -> Schedule:
    check_slot_of_assignment(ids_TK, num_slots)
    if max(num_keys, num_slots) > MOST_SLOTS:
        raise InputError(
            f"there are {max(num_keys, num_slots)} slots or experts; the kernels take {MOST_SLOTS} at most"
        )
    if os.environ.get("RELIBRA_DEBUG") == "1":
        torch._assert_async(((ids_TK >= -1) & (ids_TK < num_keys)).all(), f"ids must lie in -1..{num_keys - 1}")
    block_sizes = tuple(dict.fromkeys((*block_sizes, *row_blocks(target(ids_TK)))))
    ids_TK, device, total = ids_TK.contiguous(), ids_TK.device, ids_TK.numel()
    num_rows = total if num_rows is None else num_rows
    if not 0 <= num_rows <= total:
        raise InputError(f"num_rows is {num_rows}; it must lie in 0..{total}")

    def table(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    config = config or chosen_block("schedule", ids_TK, 0, total, num_slots=num_keys)
    block, warps = counting_block(config) if total <= MOST_COUNTED else (config.columns, config.num_warps)
    num_blocks = max(1, ceil_div(total, block))
    rows = num_blocks if total <= MOST_COUNTED else 1  # of the small tables: one a block, or one
    bins = next_power_of_2(num_keys + 1)
    num_parts = 0 if splits is None else splits.slot_EP.shape[1]
    bounds = [tile_bound(num_rows, num_slots, size) for size in block_sizes]
    starts = [bound + bound % 2 for bound in bounds]  # of 8 bytes each: every table begins at 16 bytes
    shift, totals, slot_offsets = table(num_blocks, bins), table(rows, num_keys), table(rows, num_slots + 1)
    first_tile, tiles = table(rows, len(bounds), num_slots + 1), table(sum(starts), 2)
    assignment_of, position_of = table(num_rows), table(*ids_TK.shape)
    offsets = (slot_offsets, first_tile, totals)
    parts_of_key = (splits.cumulative_EP, splits.slot_EP) if splits is not None else (None, None)
    result = (assignment_of, position_of, tiles, total, num_rows)
    sizes = {"NUM_KEYS": num_keys, "BINS": bins}
    shape = {"NUM_SLOTS": num_slots, "NUM_PARTS": num_parts, "BLOCK_SIZES": block_sizes}
    padded = {
        "SLOTS": next_power_of_2(num_slots),
        "PARTS": next_power_of_2(max(num_keys * num_parts, 1)),
    }
    placing = {
        "STRIPE": next_power_of_2(ceil_div(max(bounds), num_blocks)),
        "SEARCH_STEPS": num_slots.bit_length() + 1,
        "BLOCK": block,
        "num_warps": warps,
    }
    if total <= MOST_COUNTED:
        how = {**sizes, **shape, **padded, **placing, "COUNTED": COUNTED}
        launch(_schedule_kernel, (num_blocks,), ids_TK, shift, *offsets, *parts_of_key, *result, **how)
    else:
        launch(_count_kernel, (num_blocks,), ids_TK, shift, total, **sizes, BLOCK=block, num_warps=warps)
        scanned = max(1, (4096 if splits is None else 2048) // bins)  # more spills with splits on sm_90, by Triton 3.6
        how = {**sizes, **shape, **padded, "ROWS": scanned, "num_warps": 8}
        launch(_scan_kernel, (1,), shift, *offsets, *parts_of_key, num_blocks, **how)
        how = {**sizes, **shape, **placing}
        launch(_scatter_kernel, (num_blocks,), ids_TK, shift, slot_offsets, first_tile, *parts_of_key, *result, **how)
    parts = [part[:bound] for part, bound in zip(tiles.split(starts), bounds, strict=True)]
    return Schedule(slot_offsets[0], assignment_of, position_of, dict(zip(block_sizes, parts, strict=True)))
