"""The tables of `Schedule`, built on the device in three launches without waiting for it, or in one."""

import os
from collections.abc import Sequence

import numpy as np
import torch

from ..configs.config import BlockConfig, row_blocks
from ..planner.errors import InputError
from ..schedule import Schedule, check_slot_of_assignment, tile_bound
from .constants import ceil_div, chosen_block, next_power_of_2
from .launch import launch, target
from .schedule_kernels import _count_kernel, _scan_kernel, _scatter_kernel, _schedule_kernel

MOST_SLOTS = 512  # a row of counts is one vector
MOST_COUNTED = 1 << 16  # assignments that every block counts by itself: 4096 tokens with up to 16 experts each
COUNTED = 2048  # of them at a time


def counting_block(config: BlockConfig) -> tuple[int, int]:
    """(assignments, warps) of a block that counts all assignments by itself.

    Twice the warps, and no blocks of 4096: they spill registers here.
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
    slots_TK = slot_of_assignment_TK
    check_slot_of_assignment(slots_TK, num_slots)
    if num_slots > MOST_SLOTS:
        raise InputError(f"there are {num_slots} slots; the kernels take {MOST_SLOTS} at most")
    if os.environ.get("RELIBRA_DEBUG") == "1":
        torch._assert_async(((slots_TK >= -1) & (slots_TK < num_slots)).all(), f"ids must lie in -1..{num_slots - 1}")
    block_sizes = tuple(dict.fromkeys((*block_sizes, *row_blocks(target(slots_TK)))))
    slots_TK, device, total = slots_TK.contiguous(), slots_TK.device, slots_TK.numel()
    num_rows = total if num_rows is None else num_rows
    if not 0 <= num_rows <= total:
        raise InputError(f"num_rows is {num_rows}; it must lie in 0..{total}")

    def table(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    config = config or chosen_block("schedule", slots_TK, 0, total, num_slots=num_slots)
    block, warps = counting_block(config) if total <= MOST_COUNTED else (config.columns, config.num_warps)
    num_blocks = max(1, ceil_div(total, block))
    rows = num_blocks if total <= MOST_COUNTED else 1  # of the small tables: one a block, or one
    bins = next_power_of_2(num_slots + 1)
    bounds = [tile_bound(num_rows, num_slots, size) for size in block_sizes]
    starts = [bound + bound % 2 for bound in bounds]  # of 8 bytes each: every table begins at 16 bytes
    shift, totals, slot_offsets = table(num_blocks, bins), table(rows, num_slots), table(rows, num_slots + 1)
    first_tile, tiles = table(rows, len(bounds), num_slots + 1), table(sum(starts), 2)
    assignment_of, position_of = table(num_rows), table(*slots_TK.shape)
    offsets = (slot_offsets, first_tile, totals)
    result = (assignment_of, position_of, tiles, total, num_rows)
    sizes = {"NUM_SLOTS": num_slots, "BINS": bins}
    scanning = {"SLOTS": next_power_of_2(num_slots), "BLOCK_SIZES": block_sizes}
    placing = {
        "STRIPE": next_power_of_2(ceil_div(max(bounds), num_blocks)),
        "SEARCH_STEPS": num_slots.bit_length() + 1,
        "BLOCK": block,
        "num_warps": warps,
    }
    if total <= MOST_COUNTED:
        how = {**sizes, **scanning, **placing, "COUNTED": COUNTED}
        launch(_schedule_kernel, (num_blocks,), slots_TK, shift, *offsets, *result, **how)
    else:
        launch(_count_kernel, (num_blocks,), slots_TK, shift, None, total, **sizes, BLOCK=block, num_warps=warps)
        how = {**sizes, **scanning, "ROWS": max(1, 4096 // bins), "BLOCK": block, "num_warps": 8}
        launch(_scan_kernel, (1,), shift, *offsets, None, total, **how)
        how = {**sizes, **placing, "BLOCK_SIZES": block_sizes}
        where = (slots_TK, shift, slot_offsets, first_tile, assignment_of, position_of, tiles)
        launch(_scatter_kernel, (num_blocks,), *where, None, total, num_rows, **how)
    parts = [part[:bound] for part, bound in zip(tiles.split(starts), bounds, strict=True)]
    return Schedule(slot_offsets[0], assignment_of, position_of, dict(zip(block_sizes, parts, strict=True)))


def build_schedules(
    slot_of_assignment_RK: torch.Tensor,
    rows: Sequence[int],
    num_slots: int,
    num_rows: Sequence[int],
    *,
    config: BlockConfig | None = None,
) -> list[Schedule]:
    """`build_schedule` of several parts at once, such as the layers of a micro-batch: three launches for all of them.

    One part alone is built as `build_schedule` does.

    Args:
        slot_of_assignment_RK: of all parts, one after another. rows: how many each part has.
        num_rows: how many assignments of each part are not dropped.
    """
    slots_RK, device, count = slot_of_assignment_RK, slot_of_assignment_RK.device, len(rows)
    if count == 1:
        return [build_schedule(slots_RK, num_slots, num_rows=num_rows[0], config=config)]
    check_slot_of_assignment(slots_RK, num_slots)
    if num_slots > MOST_SLOTS:
        raise InputError(f"there are {num_slots} slots; the kernels take {MOST_SLOTS} at most")
    if not count:
        return []
    totals_P, used_P = (np.array(counts, np.int64) for counts in (rows, num_rows))
    totals_P *= slots_RK.shape[1]
    if (used_P < 0).any() or (used_P > totals_P).any():
        raise InputError(f"num_rows is {list(num_rows)}; they must lie in 0..{totals_P.tolist()}")
    block_sizes = tuple(dict.fromkeys(row_blocks(target(slots_RK))))
    config = config or chosen_block("schedule", slots_RK, 0, int(totals_P.max()), num_slots=num_slots)
    blocks_P = (-(-totals_P // config.columns)).clip(min=1)
    bounds_PB = np.stack([-(-used_P // size) + num_slots for size in block_sizes], 1)  # `tile_bound`
    rooms_PB, room_P = bounds_PB + bounds_PB % 2, used_P + -used_P % 4  # every table begins at 16 bytes
    parts = _on_device(_parts(totals_P, used_P, blocks_P, room_P, 2 * rooms_PB.sum(1)), device)

    def table(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    bins = next_power_of_2(num_slots + 1)
    shift, totals = table(int(blocks_P.sum()), bins), table(count, num_slots)
    slot_offsets, first_tile = table(count, num_slots + 1), table(count, len(block_sizes), num_slots + 1)
    assignment_of, position_of = table(int(room_P.sum())), table(*slots_RK.shape)
    tiles, grid = table(int(rooms_PB.sum()), 2), (int(blocks_P.max()), count)
    sizes = {"NUM_SLOTS": num_slots, "BINS": bins, "BLOCK": config.columns}
    launch(_count_kernel, grid, slots_RK, shift, parts, 0, **sizes, num_warps=config.num_warps)
    scanning = {"SLOTS": next_power_of_2(num_slots), "BLOCK_SIZES": block_sizes, "ROWS": max(1, 4096 // bins)}
    offsets, how = (slot_offsets, first_tile), {**sizes, **scanning, "num_warps": 8}
    launch(_scan_kernel, (1, count), shift, *offsets, totals, parts, 0, **how)
    stripe = next_power_of_2(int((-(-bounds_PB // blocks_P[:, None])).max()))
    placing = {"BLOCK_SIZES": block_sizes, "STRIPE": stripe, "SEARCH_STEPS": num_slots.bit_length() + 1}
    result, how = (assignment_of, position_of, tiles), {**sizes, **placing, "num_warps": config.num_warps}
    launch(_scatter_kernel, grid, slots_RK, shift, *offsets, *result, parts, 0, 0, **how)
    pieces = iter(tiles.split(rooms_PB.reshape(-1).tolist()))
    tables = [
        {size: next(pieces)[:bound] for size, bound in zip(block_sizes, of_part, strict=True)}
        for of_part in bounds_PB.tolist()
    ]
    padded = zip(assignment_of.split(room_P.tolist()), num_rows, strict=True)
    assignments = [of_part[:length] for of_part, length in padded]
    return list(map(Schedule, slot_offsets.unbind(), assignments, position_of.split(list(rows)), tables))


def _parts(totals_P: np.ndarray, used_P: np.ndarray, *taken_P: np.ndarray) -> np.ndarray:
    """int64 [parts, 6], a row of `PART` each: from what every part takes of each table."""
    begins = [taken.cumsum() - taken for taken in (totals_P, *taken_P)]
    return np.stack([totals_P, used_P, *begins], 1)


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
