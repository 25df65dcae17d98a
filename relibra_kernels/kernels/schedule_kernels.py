# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""The kernels of `schedule.py`: what blocks of assignments count and where they place them.

1. count: each block of assignments counts its assignments of every slot. The counts are the block's row of `shift`.
2. scan: one program turns the counts into what a block adds to a position in it (3.), and the totals into the slots'
   offsets.
3. scatter: each block sorts its (slot, index) pairs. An assignment's position in the sorted block plus the block's
   `shift` is its occurrence number j in the slot; the slot's offset plus j is its row.

Up to `MOST_COUNTED` assignments every block counts all of them by itself, so that no block waits for another and one
launch does all three. Each has small tables of its own; those of block 0 are the schedule's.

Several parts, such as the layers of a micro-batch, are done together in three launches: the second axis of the grid is
the part, and a table says where its ids and tables begin.

Everything is integers and no sum depends on an order, so the tables are the same at every launch.
"""

import triton
import triton.language as tl

from .launch import TABLES

# int64 numbers of a part, in the table of parts: its assignments and rows, and where its ids and positions, its blocks'
# counts, its rows and its tiles begin.
PART = ("num_assignments", "num_rows", "first_id", "first_block", "first_row", "first_tile")


@triton.jit
def _keys(ids_ptr, block, num_assignments, NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The block's ids; what is dropped, out of range or past the end becomes NUM_SLOTS."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_assignments
    ids = tl.load(ids_ptr + index, mask=inside, other=0).to(tl.int64)  # wide enough for -1 and NUM_SLOTS
    return tl.where(inside & (ids >= 0) & (ids < NUM_SLOTS), ids, NUM_SLOTS).to(tl.int32)


@triton.jit
def _of_part(parts_ptr, field: tl.constexpr):
    """A number of this program's part: see `PART`."""
    return tl.load(parts_ptr + tl.program_id(1) * 6 + field)


@triton.jit(do_not_specialize=["num_assignments"], do_not_specialize_on_alignment=TABLES)
def _count_kernel(
    ids_ptr, shift_ptr, parts_ptr, num_assignments, NUM_SLOTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    if parts_ptr is not None:
        num_assignments = _of_part(parts_ptr, 0).to(tl.int32)
        ids_ptr += _of_part(parts_ptr, 2)
        shift_ptr += _of_part(parts_ptr, 3) * BINS
    if block < tl.maximum(tl.cdiv(num_assignments, BLOCK), 1):
        keys = _keys(ids_ptr, block, num_assignments, NUM_SLOTS, BLOCK)
        counts = tl.histogram(keys, BINS)
        tl.store(shift_ptr + block.to(tl.int64) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _offsets(
    totals,
    slot_offsets_ptr,
    first_tile_ptr,
    totals_ptr,
    NUM_SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
):
    """From every slot's total: the slots' first rows and first tiles."""
    keys = tl.arange(0, BINS)
    slots = tl.arange(0, SLOTS)
    tl.store(totals_ptr + keys, totals, mask=keys < NUM_SLOTS)
    tl.debug_barrier()
    counts_of_slot = tl.load(totals_ptr + slots, mask=slots < NUM_SLOTS, other=0)
    ends = tl.cumsum(counts_of_slot, 0)
    tl.store(slot_offsets_ptr + slots, ends - counts_of_slot, mask=slots < NUM_SLOTS)
    tl.store(slot_offsets_ptr + 1 + slots, ends, mask=slots == NUM_SLOTS - 1)
    for i in tl.static_range(len(BLOCK_SIZES)):
        tiles = (counts_of_slot + BLOCK_SIZES[i] - 1) // BLOCK_SIZES[i]
        tile_ends = tl.cumsum(tiles, 0)
        tl.store(first_tile_ptr + i * (NUM_SLOTS + 1) + slots, tile_ends - tiles, mask=slots < NUM_SLOTS)
        tl.store(first_tile_ptr + i * (NUM_SLOTS + 1) + 1 + slots, tile_ends, mask=slots == NUM_SLOTS - 1)


@triton.jit(do_not_specialize=["num_assignments"], do_not_specialize_on_alignment=TABLES)
def _scan_kernel(
    shift_ptr,
    slot_offsets_ptr,
    first_tile_ptr,
    totals_ptr,
    parts_ptr,
    num_assignments,
    NUM_SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place: `shift[b, e] = occurrences of slot e before block b - place of its first in the sorted block b`."""
    if parts_ptr is not None:
        num_assignments = _of_part(parts_ptr, 0).to(tl.int32)
        shift_ptr += _of_part(parts_ptr, 3) * BINS
        slot_offsets_ptr += tl.program_id(1) * (NUM_SLOTS + 1)
        first_tile_ptr += tl.program_id(1) * len(BLOCK_SIZES) * (NUM_SLOTS + 1)
        totals_ptr += tl.program_id(1) * NUM_SLOTS
    num_blocks = tl.maximum(tl.cdiv(num_assignments, BLOCK), 1)
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

    _offsets(
        carry, slot_offsets_ptr, first_tile_ptr, totals_ptr,
        NUM_SLOTS, BINS, SLOTS, BLOCK_SIZES,
    )  # fmt: skip


@triton.jit
def _scatter(
    block,
    ids_ptr,
    shift_ptr,
    slot_offsets_ptr,
    first_tile_ptr,
    assignment_of_ptr,
    position_of_ptr,
    tiles_ptr,
    num_assignments,
    num_rows,
    NUM_SLOTS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    STRIPE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Place one block's assignments, and write its part of the unused tail and of the tables of tiles."""
    lane = tl.arange(0, BLOCK)
    keys = _keys(ids_ptr, block, num_assignments, NUM_SLOTS, BLOCK)
    ordered = tl.sort(keys * BLOCK + lane)
    key, assignment = ordered // BLOCK, block * BLOCK + ordered % BLOCK
    real = key < NUM_SLOTS
    occurrence = lane + tl.load(shift_ptr + key, mask=real, other=0)
    row = occurrence + tl.load(slot_offsets_ptr + key, mask=real, other=0)
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


@triton.jit(do_not_specialize=["num_assignments", "num_rows"], do_not_specialize_on_alignment=TABLES)
def _scatter_kernel(
    ids_ptr,
    shift_ptr,
    slot_offsets_ptr,
    first_tile_ptr,
    assignment_of_ptr,
    position_of_ptr,
    tiles_ptr,
    parts_ptr,
    num_assignments,
    num_rows,
    NUM_SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    STRIPE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if parts_ptr is not None:
        num_assignments = _of_part(parts_ptr, 0).to(tl.int32)
        num_rows = _of_part(parts_ptr, 1).to(tl.int32)
        ids_ptr += _of_part(parts_ptr, 2)
        position_of_ptr += _of_part(parts_ptr, 2)
        shift_ptr += _of_part(parts_ptr, 3) * BINS
        assignment_of_ptr += _of_part(parts_ptr, 4)
        tiles_ptr += _of_part(parts_ptr, 5)
        slot_offsets_ptr += tl.program_id(1) * (NUM_SLOTS + 1)
        first_tile_ptr += tl.program_id(1) * len(BLOCK_SIZES) * (NUM_SLOTS + 1)
    if block < tl.maximum(tl.cdiv(num_assignments, BLOCK), 1):
        _scatter(
            block, ids_ptr, shift_ptr + block.to(tl.int64) * BINS, slot_offsets_ptr, first_tile_ptr,
            assignment_of_ptr, position_of_ptr, tiles_ptr, num_assignments, num_rows,
            NUM_SLOTS, BLOCK_SIZES, STRIPE, SEARCH_STEPS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_assignments", "num_rows"], do_not_specialize_on_alignment=TABLES)
def _schedule_kernel(
    ids_ptr,
    shift_ptr,
    slot_offsets_ptr,
    first_tile_ptr,
    totals_ptr,
    assignment_of_ptr,
    position_of_ptr,
    tiles_ptr,
    num_assignments,
    num_rows,
    NUM_SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    STRIPE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """All in one launch: `shift`, `slot_offsets`, `first_tile` and `totals` have a row for every block."""
    block = tl.program_id(0)
    shift_ptr += block.to(tl.int64) * BINS
    slot_offsets_ptr += block * (NUM_SLOTS + 1)
    first_tile_ptr += block * len(BLOCK_SIZES) * (NUM_SLOTS + 1)
    totals_ptr += block * NUM_SLOTS
    totals = tl.zeros([BINS], dtype=tl.int32)
    before = tl.zeros([BINS], dtype=tl.int32)
    for part in range(0, tl.cdiv(num_assignments, COUNTED)):
        keys = _keys(ids_ptr, part, num_assignments, NUM_SLOTS, COUNTED)
        earlier = part * COUNTED + tl.arange(0, COUNTED) < block * BLOCK
        totals += tl.histogram(keys, BINS)
        before += tl.histogram(tl.where(earlier, keys, NUM_SLOTS), BINS)
    counts = tl.histogram(_keys(ids_ptr, block, num_assignments, NUM_SLOTS, BLOCK), BINS)
    tl.store(shift_ptr + tl.arange(0, BINS), before - (tl.cumsum(counts, 0) - counts))
    _offsets(
        totals, slot_offsets_ptr, first_tile_ptr, totals_ptr,
        NUM_SLOTS, BINS, SLOTS, BLOCK_SIZES,
    )  # fmt: skip
    tl.debug_barrier()
    _scatter(
        block, ids_ptr, shift_ptr, slot_offsets_ptr, first_tile_ptr,
        assignment_of_ptr, position_of_ptr, tiles_ptr, num_assignments, num_rows,
        NUM_SLOTS, BLOCK_SIZES, STRIPE, SEARCH_STEPS, BLOCK,
    )  # fmt: skip
