# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""The kernel of `grad_weight.py`: the tiles of one weight's gradient, a slot's rows after another.

A program computes TILES neighbouring tiles of one weight, one after the other. For each it adds up that weight's slots
in slot order in its fp32 accumulator and then adds the tile to the gradient once: a tile has one writer, so the result
does not depend on the grid. With TMA the sum happens in the L2 cache, and no gradient comes into registers; else the
tile goes through registers in blocks of columns. A weight without rows costs nothing, or zeros where the buffer is
overwritten.

Rows of one side are picked by token. The tokens of the next block are loaded while this one is multiplied, and carried
through the loop: an index that is loaded and used in the same iteration costs the pipeline a buffer.
"""

import triton
import triton.language as tl

from .launch import TABLES
from .tiles import dot, index_of, slots_of, stored


@triton.jit
def _tokens(assignment_of_ptr, r0, end, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tokens of the rows r0..; 0 from `end` on, where the table may have none: the last slot may be empty."""
    row = r0 + tl.arange(0, BLOCK_K)
    return tl.load(assignment_of_ptr + row, mask=row < end, other=0) // TOP_K


@triton.jit
def _whole_block(
    ptr,
    described,
    r0,
    token_K,
    column0,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
    AS_COLUMNS: tl.constexpr,
    OFFSETS_32: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`[BLOCK_K, BLOCK]` of rows r0.., columns column0.., all of the slot; AS_COLUMNS gives the transpose.

    TOP_K > 0: rows are tokens, picked by index. Columns past WIDTH are read from elsewhere: they are never stored.
    """
    if TMA and TOP_K == 0:
        return described.load([r0, column0])
    else:
        row = r0 + tl.arange(0, BLOCK_K)
        if TOP_K > 0:
            row = token_K
        if not OFFSETS_32:
            row = row.to(tl.int64)
        start = row * WIDTH
        column = (column0 + tl.arange(0, BLOCK)) % WIDTH
        if AS_COLUMNS:
            return tl.load(ptr + (start[None, :] + column[:, None]))
        else:
            return tl.load(ptr + (start[:, None] + column[None, :]))


@triton.jit
def _last_block(
    ptr,
    assignment_of_ptr,
    r0,
    end,
    column0,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`[BLOCK_K, BLOCK]` of the rows r0 to end, then zeros. Masks cost registers: only the last block has them."""
    row = r0 + tl.arange(0, BLOCK_K)
    here = row < end
    if TOP_K > 0:
        row = _tokens(assignment_of_ptr, r0, end, TOP_K, BLOCK_K)
    column = (column0 + tl.arange(0, BLOCK)) % WIDTH
    return tl.load(ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :], mask=here[:, None], other=0.0)


@triton.jit
def _slot_sum(
    acc,
    left_ptr,
    right_ptr,
    left_of,
    right_of,
    assignment_of_ptr,
    start,
    end,
    n0,
    d0,
    N: tl.constexpr,
    D: tl.constexpr,
    TOP_K_LEFT: tl.constexpr,
    TOP_K_RIGHT: tl.constexpr,
    TMA: tl.constexpr,
    OFFSETS_32: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + left[rows]^T right[rows] of one slot: whole blocks without masks, then the rest."""
    TOP_K: tl.constexpr = TOP_K_LEFT if TOP_K_LEFT > 0 else TOP_K_RIGHT
    AS_COLUMNS: tl.constexpr = (
        not TMA
    )  # without TMA only a block that is loaded transposed can be copied asynchronously
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    token_K = 0
    if TOP_K > 0:
        token_K = _tokens(assignment_of_ptr, start, whole, TOP_K, BLOCK_K)
    for r0 in range(start, whole, BLOCK_K):
        left = _whole_block(
            left_ptr, left_of, r0, token_K, n0, N, TOP_K_LEFT, TMA, AS_COLUMNS, OFFSETS_32, BLOCK_K, BLOCK_M
        )  # fmt: skip
        right = _whole_block(
            right_ptr, right_of, r0, token_K, d0, D, TOP_K_RIGHT, TMA, False, OFFSETS_32, BLOCK_K, BLOCK_N
        )
        if TOP_K > 0:
            token_K = _tokens(assignment_of_ptr, r0 + BLOCK_K, whole, TOP_K, BLOCK_K)
        if not AS_COLUMNS:
            left = left.T
        acc = dot(left, right, acc, PRECISION, UPCAST)
    if whole < end:
        left = _last_block(left_ptr, assignment_of_ptr, whole, end, n0, N, TOP_K_LEFT, BLOCK_K, BLOCK_M)
        right = _last_block(right_ptr, assignment_of_ptr, whole, end, d0, D, TOP_K_RIGHT, BLOCK_K, BLOCK_N)
        acc = dot(left.T, right, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _write_described(
    into,
    number,
    n0,
    d0,
    part,
    ACCUMULATE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add `part` to the gradient, or put it there, WIDTH columns at a time; what lies outside of it is left out."""
    if BLOCK > WIDTH:
        left, right = part.reshape(BLOCK_M, 2, BLOCK // 2).permute(0, 2, 1).split()
        _write_described(into, number, n0, d0, left, ACCUMULATE, WIDTH, BLOCK_M, BLOCK // 2)
        _write_described(into, number, n0, d0 + BLOCK // 2, right, ACCUMULATE, WIDTH, BLOCK_M, BLOCK // 2)
    elif ACCUMULATE:
        into.atomic_add([number, n0, d0], part.reshape(1, BLOCK_M, BLOCK))
    else:
        into.store([number, n0, d0], part.reshape(1, BLOCK_M, BLOCK))


@triton.jit
def _write(
    at, n0, d0, part, N: tl.constexpr, D: tl.constexpr, ACCUMULATE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same through registers; `at` is where the weight's gradient begins."""
    if BLOCK > WIDTH:
        left, right = part.reshape(BLOCK_M, 2, BLOCK // 2).permute(0, 2, 1).split()
        _write(at, n0, d0, left, N, D, ACCUMULATE, WIDTH, BLOCK_M, BLOCK // 2)
        _write(at, n0, d0 + BLOCK // 2, right, N, D, ACCUMULATE, WIDTH, BLOCK_M, BLOCK // 2)
    else:
        column = d0 + tl.arange(0, BLOCK)
        inside = (n0 + tl.arange(0, BLOCK_M) < N)[:, None] & (column < D)[None, :]
        # a 64-bit start and 32-bit offsets inside the tile: registers
        tile = at + n0.to(tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + column[None, :])
        if ACCUMULATE:
            part += tl.load(tile, mask=inside, other=0.0)
        tl.store(tile, part.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _describe(
    ptr, num_rows, WIDTH: tl.constexpr, TOP_K: tl.constexpr, TMA: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Descriptor of rows in slot order; the pointer itself where they are picked by token, or there is no TMA."""
    if TMA and TOP_K == 0:
        return tl.make_tensor_descriptor(ptr, [num_rows, WIDTH], [WIDTH, 1], [BLOCK_K, BLOCK])
    else:
        return ptr


@triton.jit
def _tile(
    left_ptr,
    right_ptr,
    left_of,
    right_of,
    grad_ptr,
    replica_grad_ptr,
    into,
    slot_offsets_ptr,
    weight_of_slot_ptr,
    assignment_of_ptr,
    weight,
    num_home,
    home_first,
    replica_first,
    slots,
    n0,
    d0,
    N: tl.constexpr,
    D: tl.constexpr,
    TOP_K_LEFT: tl.constexpr,
    TOP_K_RIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    TMA_WRITES: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSETS_32: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add up one tile of a weight's gradient over its slots, and write it."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    found = 0
    for slot in range(slots[0], slots[1]):
        mine = True
        if weight_of_slot_ptr is not None:
            mine = tl.load(weight_of_slot_ptr + slot) == weight
        if mine:
            start = tl.load(slot_offsets_ptr + slot)
            end = tl.load(slot_offsets_ptr + slot + 1)
            found += end - start
            acc = _slot_sum(
                acc, left_ptr, right_ptr, left_of, right_of, assignment_of_ptr, start, end, n0, d0,
                N, D, TOP_K_LEFT, TOP_K_RIGHT, TMA, OFFSETS_32, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if found > 0 or not ACCUMULATE:
        if TMA_WRITES:
            number = index_of(weight, num_home, home_first, replica_first)
            total = acc.to(grad_ptr.dtype.element_ty)
            _write_described(into, number, n0, d0, total, ACCUMULATE, WIDTH, BLOCK_M, BLOCK_N)
        else:
            at = grad_ptr + index_of(weight, num_home, home_first, replica_first).to(tl.int64) * (N * D)
            if replica_grad_ptr is not None:
                at = stored(grad_ptr, replica_grad_ptr, weight, num_home, N * D)
            _write(at, n0, d0, acc, N, D, ACCUMULATE, WIDTH, BLOCK_M, BLOCK_N)


@triton.jit(
    do_not_specialize=["num_rows", "num_slots", "num_home", "home_first", "replica_first", "count"],
    do_not_specialize_on_alignment=TABLES,
)
def _grad_weight_kernel(
    left_ptr,
    right_ptr,
    grad_ptr,
    replica_grad_ptr,
    slot_offsets_ptr,
    weight_of_slot_ptr,
    assignment_of_ptr,
    num_rows,
    num_slots,
    num_home,
    home_first,
    replica_first,
    count,
    N: tl.constexpr,
    D: tl.constexpr,
    TOP_K_LEFT: tl.constexpr,
    TOP_K_RIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    TMA_WRITES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    HALF_LAST: tl.constexpr,
    SLOTS: tl.constexpr,
    OFFSETS_32: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_N: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    NUM_D: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    GROUPS: tl.constexpr = (NUM_N * NUM_D + TILES - 1) // TILES
    weight = tl.program_id(0) // GROUPS
    first_tile = tl.program_id(0) % GROUPS * TILES
    into = grad_ptr
    left_of = _describe(left_ptr, num_rows, N, TOP_K_LEFT, TMA, BLOCK_K, BLOCK_M)
    right_of = _describe(right_ptr, num_rows, D, TOP_K_RIGHT, TMA, BLOCK_K, BLOCK_N)
    if TMA_WRITES:
        into = tl.make_tensor_descriptor(grad_ptr, [count, N, D], [N * D, D, 1], [1, BLOCK_M, WIDTH])
    if HALF_LAST:
        half_of = _describe(right_ptr, num_rows, D, TOP_K_RIGHT, TMA, BLOCK_K, BLOCK_N // 2)
    slots = slots_of(weight, num_slots, weight_of_slot_ptr, SLOTS)
    for tile in range(first_tile, tl.minimum(first_tile + TILES, NUM_N * NUM_D)):
        n0 = tile // NUM_D * BLOCK_M
        d0 = tile % NUM_D * BLOCK_N
        if HALF_LAST and tile % NUM_D == NUM_D - 1:
            _tile(
                left_ptr, right_ptr, left_of, half_of, grad_ptr, replica_grad_ptr, into, slot_offsets_ptr,
                weight_of_slot_ptr, assignment_of_ptr, weight, num_home, home_first, replica_first, slots, n0, d0,
                N, D, TOP_K_LEFT, TOP_K_RIGHT, ACCUMULATE, TMA, TMA_WRITES, WIDTH, OFFSETS_32, PRECISION, UPCAST,
                BLOCK_M, BLOCK_N // 2, BLOCK_K,
            )  # fmt: skip
        else:
            _tile(
                left_ptr, right_ptr, left_of, right_of, grad_ptr, replica_grad_ptr, into, slot_offsets_ptr,
                weight_of_slot_ptr, assignment_of_ptr, weight, num_home, home_first, replica_first, slots, n0, d0,
                N, D, TOP_K_LEFT, TOP_K_RIGHT, ACCUMULATE, TMA, TMA_WRITES, WIDTH, OFFSETS_32, PRECISION, UPCAST,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
