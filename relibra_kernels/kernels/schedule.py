# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""The tables of `Schedule`, built on the device in three launches without waiting for it.

1. count: each block of assignments counts its keys (experts), a row of `shift` a block.
2. scan: one program turns the counts into each block's first occurrence numbers, and the totals into offsets.
3. scatter: each block sorts its (key, index) pairs; position in the sorted block plus the block's shift is the
   occurrence number j of an assignment in its expert; its quota gives the slot, slot offset plus rank the row.

Everything is integers and no sum depends on an order, so the tables are the same at every launch.
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig, row_blocks
from ..planner.errors import InputError
from ..schedule import Schedule, Splits, check_slot_of_assignment, check_splits, tile_bound
from .constants import chosen_block
from .launch import TABLES, launch, target

MOST_SLOTS = 512  # a row of counts is one vector


@triton.jit
def _keys(ids_ptr, block, num_assignments, NUM_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The block's ids; what is dropped, out of range or past the end becomes NUM_KEYS."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_assignments
    ids = tl.load(ids_ptr + index, mask=inside, other=0).to(tl.int64)  # wide enough for -1 and NUM_KEYS
    return tl.where(inside & (ids >= 0) & (ids < NUM_KEYS), ids, NUM_KEYS).to(tl.int32)


@triton.jit(do_not_specialize=["num_assignments"], do_not_specialize_on_alignment=TABLES)
def _count_kernel(ids_ptr, shift_ptr, num_assignments, NUM_KEYS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    keys = _keys(ids_ptr, block, num_assignments, NUM_KEYS, BLOCK)
    counts = tl.histogram(keys, BINS)
    tl.store(shift_ptr + block.to(tl.int64) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=TABLES)
def _scan_kernel(
    shift_ptr,
    slot_offsets_ptr,
    first_tile_ptr,
    totals_ptr,
    cumulative_ptr,
    slot_ptr,
    num_blocks,
    NUM_KEYS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """In place: `shift[b, e] = occurrences of e before block b - place of e's first key in the sorted block b`."""
    keys = tl.arange(0, BINS)
    carry = tl.zeros([BINS], dtype=tl.int32)
    for first in range(0, num_blocks, ROWS):
        blocks = first + tl.arange(0, ROWS)
        where = shift_ptr + blocks[:, None].to(tl.int64) * BINS + keys[None, :]
        here = blocks[:, None] < num_blocks
        counts = tl.load(where, mask=here, other=0)
        before = tl.cumsum(counts, 0) - counts + carry[None, :]
        place = tl.cumsum(counts, 1) - counts
        tl.store(where, before - place, mask=here)
        carry += tl.sum(counts, 0)

    slots = tl.arange(0, SLOTS)
    tl.store(totals_ptr + keys, carry, mask=keys < NUM_KEYS)
    tl.debug_barrier()
    if NUM_PARTS == 0:
        counts_of_slot = tl.load(totals_ptr + slots, mask=slots < NUM_SLOTS, other=0)
    else:
        # slot_offsets holds the slots' counts on the way
        tl.store(slot_offsets_ptr + slots, tl.zeros([SLOTS], dtype=tl.int32), mask=slots < NUM_SLOTS)
        tl.debug_barrier()
        part = tl.arange(0, PARTS)
        real = part < NUM_KEYS * NUM_PARTS
        total = tl.load(totals_ptr + part // NUM_PARTS, mask=real, other=0)
        last = tl.load(cumulative_ptr + part, mask=real, other=0)
        first_of_part = tl.load(cumulative_ptr + part - 1, mask=real & (part % NUM_PARTS > 0), other=0)
        slot = tl.load(slot_ptr + part, mask=real, other=-1)
        taken = tl.minimum(total, last) - tl.minimum(total, first_of_part)
        tl.store(slot_offsets_ptr + slot, taken, mask=real & (slot >= 0))
        tl.debug_barrier()
        counts_of_slot = tl.load(slot_offsets_ptr + slots, mask=slots < NUM_SLOTS, other=0)
        tl.debug_barrier()
    ends = tl.cumsum(counts_of_slot, 0)
    tl.store(slot_offsets_ptr + slots, ends - counts_of_slot, mask=slots < NUM_SLOTS)
    tl.store(slot_offsets_ptr + 1 + slots, ends, mask=slots == NUM_SLOTS - 1)
    for i in tl.static_range(len(BLOCK_SIZES)):
        tiles = (counts_of_slot + BLOCK_SIZES[i] - 1) // BLOCK_SIZES[i]
        tile_ends = tl.cumsum(tiles, 0)
        tl.store(first_tile_ptr + i * (NUM_SLOTS + 1) + slots, tile_ends - tiles, mask=slots < NUM_SLOTS)
        tl.store(first_tile_ptr + i * (NUM_SLOTS + 1) + 1 + slots, tile_ends, mask=slots == NUM_SLOTS - 1)


@triton.jit(do_not_specialize=["num_assignments", "num_rows"], do_not_specialize_on_alignment=TABLES)
def _scatter_kernel(
    ids_ptr,
    shift_ptr,
    slot_offsets_ptr,
    first_tile_ptr,
    cumulative_ptr,
    slot_ptr,
    assignment_of_ptr,
    position_of_ptr,
    tiles_ptr,
    num_assignments,
    num_rows,
    NUM_KEYS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    STRIPE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    keys = _keys(ids_ptr, block, num_assignments, NUM_KEYS, BLOCK)
    ordered = tl.sort(keys * BLOCK + lane)
    key, assignment = ordered // BLOCK, block * BLOCK + ordered % BLOCK
    real = key < NUM_KEYS
    occurrence = lane + tl.load(shift_ptr + block.to(tl.int64) * BINS + key, mask=real, other=0)
    slot = key
    if NUM_PARTS > 0:
        slot = tl.full([BLOCK], -1, dtype=tl.int32)
        rank = occurrence
        before = tl.zeros([BLOCK], dtype=tl.int32)
        for part in tl.static_range(NUM_PARTS):
            last = tl.load(cumulative_ptr + key * NUM_PARTS + part, mask=real, other=0)
            mine = (occurrence >= before) & (occurrence < last)
            slot = tl.where(mine, tl.load(slot_ptr + key * NUM_PARTS + part, mask=real, other=-1), slot)
            rank = tl.where(mine, occurrence - before, rank)
            before = last
        real = real & (slot >= 0)
        occurrence = rank
    row = occurrence + tl.load(slot_offsets_ptr + slot, mask=real, other=0)
    tl.store(assignment_of_ptr + row, assignment, mask=real & (row < num_rows))
    tl.store(position_of_ptr + assignment, tl.where(real, row, -1), mask=assignment < num_assignments)

    tail = block * BLOCK + lane
    used = tl.load(slot_offsets_ptr + NUM_SLOTS)
    tl.store(assignment_of_ptr + tail, tl.full([BLOCK], -1, dtype=tl.int32), mask=(tail >= used) & (tail < num_rows))

    base = 0
    for i in tl.static_range(len(BLOCK_SIZES)):
        bound = (num_rows + BLOCK_SIZES[i] - 1) // BLOCK_SIZES[i] + NUM_SLOTS
        tile = block * STRIPE + tl.arange(0, STRIPE)
        firsts = first_tile_ptr + i * (NUM_SLOTS + 1)
        # the last slot whose first tile is not beyond this one
        low = tl.zeros([STRIPE], dtype=tl.int32)
        high = tl.full([STRIPE], NUM_SLOTS, dtype=tl.int32)
        for _ in tl.static_range(SEARCH_STEPS):
            middle = (low + high) // 2
            beyond = tl.load(firsts + middle) > tile
            high = tl.where(beyond, middle, high)
            low = tl.where(beyond, low, middle)
        is_tile = tile < tl.load(firsts + NUM_SLOTS)
        first_row = tl.load(slot_offsets_ptr + low) + (tile - tl.load(firsts + low)) * BLOCK_SIZES[i]
        out = tiles_ptr + (base + tile) * 2
        tl.store(out, tl.where(is_tile, low, -1), mask=tile < bound)
        tl.store(out + 1, tl.where(is_tile, first_row, -1), mask=tile < bound)
        base += (bound + 1) // 2 * 2  # every table starts at 16 bytes


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
    block, warps = config.columns, config.num_warps
    num_blocks = max(1, triton.cdiv(total, block))
    bins = triton.next_power_of_2(num_keys + 1)
    num_parts = 0 if splits is None else splits.slot_EP.shape[1]
    bounds = [tile_bound(num_rows, num_slots, size) for size in block_sizes]
    starts = [bound + bound % 2 for bound in bounds]  # of 8 bytes each: every table begins at 16 bytes
    shift, totals, slot_offsets = table(num_blocks, bins), table(num_keys), table(num_slots + 1)
    first_tile, tiles = table(len(bounds), num_slots + 1), table(sum(starts), 2)
    assignment_of, position_of = table(num_rows), table(*ids_TK.shape)
    cumulative, slot = (splits.cumulative_EP, splits.slot_EP) if splits is not None else (None, None)
    sizes = {"NUM_KEYS": num_keys, "BINS": bins}
    shape = {"NUM_SLOTS": num_slots, "NUM_PARTS": num_parts, "BLOCK_SIZES": block_sizes}
    launch(_count_kernel, (num_blocks,), ids_TK, shift, total, **sizes, BLOCK=block, num_warps=warps)
    launch(
        _scan_kernel,
        (1,),
        shift,
        slot_offsets,
        first_tile,
        totals,
        cumulative,
        slot,
        num_blocks,
        **sizes,
        **shape,
        SLOTS=triton.next_power_of_2(num_slots),
        PARTS=triton.next_power_of_2(max(num_keys * num_parts, 1)),
        ROWS=max(1, (4096 if splits is None else 2048) // bins),  # more spills with splits on sm_90, by Triton 3.6
        num_warps=8,
    )
    launch(
        _scatter_kernel,
        (num_blocks,),
        ids_TK,
        shift,
        slot_offsets,
        first_tile,
        cumulative,
        slot,
        assignment_of,
        position_of,
        tiles,
        total,
        num_rows,
        **sizes,
        **shape,
        STRIPE=triton.next_power_of_2(triton.cdiv(max(bounds), num_blocks)),
        SEARCH_STEPS=num_slots.bit_length() + 1,
        BLOCK=block,
        num_warps=warps,
    )
    parts = [part[:bound] for part, bound in zip(tiles.split(starts), bounds, strict=True)]
    return Schedule(slot_offsets, assignment_of, position_of, dict(zip(block_sizes, parts, strict=True)))
