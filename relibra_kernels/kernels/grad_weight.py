# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""`grad[w] += sum over the rows r of w's slots of left[r]ᵀ right[r]`: ragged in K, each weight contracts its own rows.

One program a tile of one weight. It adds up that weight's slots in slot order in its fp32 accumulator, then reads, adds
and writes the gradient once, so the result does not depend on the grid. A weight without rows costs nothing, or zeros
where the buffer is overwritten. The bias gradient is the same sum with 1 (or the gate weight) for left.
"""

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig, GemmConfig
from ..operands import check_operands
from ..planner.errors import ShapeError
from ..schedule import Schedule
from .constants import chosen_block, chosen_config, gemm_constants
from .launch import TABLES, launch
from .tiles import dot, stored


@triton.jit
def _rows(
    rows_of,
    assignment_of_ptr,
    r0,
    end,
    column0,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`[BLOCK_K, BLOCK]` of rows r0.., columns column0..; rows past `end` are zeros unless the block is WHOLE.

    TOP_K > 0: rows are tokens, picked by index. Columns past WIDTH are read from elsewhere: they are never stored.
    """
    if TMA and TOP_K == 0 and WHOLE:
        return rows_of.load([r0, column0])
    else:
        row = r0 + tl.arange(0, BLOCK_K)
        column = (column0 + tl.arange(0, BLOCK)) % WIDTH
        if WHOLE:
            if TOP_K > 0:
                row = tl.load(assignment_of_ptr + row) // TOP_K
            return tl.load(rows_of + row[:, None].to(tl.int64) * WIDTH + column[None, :])
        else:
            here = row < end
            if TOP_K > 0:
                row = tl.load(assignment_of_ptr + row, mask=here, other=0) // TOP_K
            return tl.load(rows_of + row[:, None].to(tl.int64) * WIDTH + column[None, :], mask=here[:, None], other=0.0)


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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + left[rows]ᵀ right[rows] of one slot: whole blocks without masks, then the rest."""
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    for r0 in range(start, whole, BLOCK_K):
        left = _rows(left_of, assignment_of_ptr, r0, end, n0, N, TOP_K_LEFT, TMA, True, BLOCK_K, BLOCK_M)
        right = _rows(right_of, assignment_of_ptr, r0, end, d0, D, TOP_K_RIGHT, TMA, True, BLOCK_K, BLOCK_N)
        acc = dot(left.T, right, acc, PRECISION, UPCAST)
    if whole < end:
        left = _rows(left_ptr, assignment_of_ptr, whole, end, n0, N, TOP_K_LEFT, TMA, False, BLOCK_K, BLOCK_M)
        right = _rows(right_ptr, assignment_of_ptr, whole, end, d0, D, TOP_K_RIGHT, TMA, False, BLOCK_K, BLOCK_N)
        acc = dot(left.T, right, acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_home"], do_not_specialize_on_alignment=TABLES)
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
    N: tl.constexpr,
    D: tl.constexpr,
    TOP_K_LEFT: tl.constexpr,
    TOP_K_RIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_N: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    NUM_D: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    weight = program // (NUM_N * NUM_D)
    n0 = program % (NUM_N * NUM_D) // NUM_D * BLOCK_M
    d0 = program % NUM_D * BLOCK_N
    left_of, right_of = left_ptr, right_ptr
    if TMA and TOP_K_LEFT == 0:
        left_of = tl.make_tensor_descriptor(left_ptr, [num_rows, N], [N, 1], [BLOCK_K, BLOCK_M])
    if TMA and TOP_K_RIGHT == 0:
        right_of = tl.make_tensor_descriptor(right_ptr, [num_rows, D], [D, 1], [BLOCK_K, BLOCK_N])
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    found = 0
    first_slot, last_slot = weight, tl.minimum(weight + 1, num_slots)
    if weight_of_slot_ptr is not None:
        first_slot, last_slot = 0, num_slots
    for slot in range(first_slot, last_slot):
        mine = True
        if weight_of_slot_ptr is not None:
            mine = tl.load(weight_of_slot_ptr + slot) == weight
        if mine:
            start = tl.load(slot_offsets_ptr + slot)
            end = tl.load(slot_offsets_ptr + slot + 1)
            found += end - start
            acc = _slot_sum(
                acc, left_ptr, right_ptr, left_of, right_of, assignment_of_ptr, start, end, n0, d0,
                N, D, TOP_K_LEFT, TOP_K_RIGHT, TMA, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if found > 0 or not ACCUMULATE:
        row = n0 + tl.arange(0, BLOCK_M)
        column = d0 + tl.arange(0, BLOCK_N)
        inside = (row < N)[:, None] & (column < D)[None, :]
        # a 64-bit start and 32-bit offsets inside the tile: registers
        at = stored(grad_ptr, replica_grad_ptr, weight, num_home, N * D) + n0.to(tl.int64) * D
        at += tl.arange(0, BLOCK_M)[:, None] * D + column[None, :]
        if ACCUMULATE:
            acc += tl.load(at, mask=inside, other=0.0)
        tl.store(at, acc.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_slots", "num_home"], do_not_specialize_on_alignment=TABLES)
def _grad_bias_kernel(
    rows_ptr,
    weights_ptr,
    grad_ptr,
    replica_grad_ptr,
    slot_offsets_ptr,
    weight_of_slot_ptr,
    assignment_of_ptr,
    num_slots,
    num_home,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    weight = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    found = 0
    for slot in range(0, num_slots):
        owner = slot
        if weight_of_slot_ptr is not None:
            owner = tl.load(weight_of_slot_ptr + slot)
        if owner == weight:
            start = tl.load(slot_offsets_ptr + slot)
            end = tl.load(slot_offsets_ptr + slot + 1)
            found += end - start
            for r0 in range(start, end, BLOCK_R):
                row = r0 + tl.arange(0, BLOCK_R)
                here = row < end
                source = row
                if TOP_K > 0 or weights_ptr is not None:
                    assignment = tl.load(assignment_of_ptr + row, mask=here, other=0)
                if TOP_K > 0:
                    source = assignment // TOP_K
                at = rows_ptr + source[:, None].to(tl.int64) * N + column[None, :]
                values = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
                if weights_ptr is not None:
                    values *= tl.load(weights_ptr + assignment, mask=here, other=0.0).to(tl.float32)[:, None]
                total += tl.sum(values, 0)
    if found > 0 or not ACCUMULATE:
        at = stored(grad_ptr, replica_grad_ptr, weight, num_home, N) + column
        if ACCUMULATE:
            total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total.to(grad_ptr.dtype.element_ty), mask=inside)


def grad_weight(
    left: torch.Tensor,
    right: torch.Tensor,
    schedule: Schedule,
    grad: torch.Tensor,
    *,
    gather_left: bool = False,
    gather_right: bool = False,
    replica_grad: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    accumulate: bool = True,
    config: GemmConfig | None = None,
) -> None:
    """`grad[w] += sum over the slots s of weight w, in slot order, of left[rows of s]^T @ right[rows of s]`, in place.

    Args:
        left, right: `[rows, N]` and `[rows, D]` rows in slot order, or `[T, ...]` tokens with the `gather_` flag.
        grad: `[E, N, D]`, fp32 where it accumulates. `replica_grad` `[S, N, D]` likewise.
        accumulate: False overwrites both buffers, in any dtype, and zeroes the weights that no row uses.
    """
    n, d = left.shape[1], right.shape[1]
    config = config or chosen_config("grad_weight", left, schedule, (n, d), layout=gather_left)
    check_grad(grad, (n, d), accumulate)
    check_operands(left, schedule.num_tokens if gather_left else schedule.num_rows)
    check_operands(right, schedule.num_tokens if gather_right else schedule.num_rows)
    if left.dtype != right.dtype:
        raise ShapeError(f"left is {left.dtype} and right {right.dtype}; they must be the same")
    weights = len(grad) + (0 if replica_grad is None else len(replica_grad))
    constants = gemm_constants(left, config, widths=(n, d), described=(left, right))
    del constants["A_MODE"], constants["XCDS"]
    constants["TMA"] = constants["TMA"] and schedule.num_rows > 0  # a descriptor describes at least one row
    launch(
        _grad_weight_kernel,
        (weights * triton.cdiv(n, config.block_m) * triton.cdiv(d, config.block_n),),
        left,
        right,
        grad,
        replica_grad,
        schedule.slot_offsets,
        weight_of_slot,
        schedule.assignment_of,
        schedule.num_rows,
        schedule.num_slots,
        len(grad),
        N=n,
        D=d,
        TOP_K_LEFT=schedule.top_k if gather_left else 0,
        TOP_K_RIGHT=schedule.top_k if gather_right else 0,
        ACCUMULATE=accumulate,
        **constants,
    )


def grad_bias(
    rows_RN: torch.Tensor,
    schedule: Schedule,
    grad: torch.Tensor,
    *,
    weights_TK: torch.Tensor | None = None,
    gather: bool = False,
    replica_grad: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    accumulate: bool = True,
    config: BlockConfig | None = None,
) -> None:
    """`grad[w] += sum over the rows r of w's slots of weight(r) * rows[r]`, `[E, N]`; flags as in `grad_weight`."""
    n, slots = rows_RN.shape[1], schedule.num_slots
    check_grad(grad, (n,), accumulate)
    config = config or chosen_block("grad_bias", rows_RN, n, schedule.num_rows, num_slots=slots)
    block = min(config.columns, triton.next_power_of_2(n))
    weights = len(grad) + (0 if replica_grad is None else len(replica_grad))
    launch(
        _grad_bias_kernel,
        (weights, triton.cdiv(n, block)),
        rows_RN,
        weights_TK,
        grad,
        replica_grad,
        schedule.slot_offsets,
        weight_of_slot,
        schedule.assignment_of,
        slots,
        len(grad),
        N=n,
        TOP_K=schedule.top_k if gather else 0,
        ACCUMULATE=accumulate,
        BLOCK_R=config.rows,
        BLOCK_N=block,
        num_warps=config.num_warps,
    )


def check_grad(grad: torch.Tensor, shape: tuple[int, ...], accumulate: bool) -> None:
    """Refuse a gradient buffer that sums would not fit into."""
    if tuple(grad.shape[1:]) != shape or not grad.is_contiguous() or (accumulate and grad.dtype != torch.float32):
        raise ShapeError(
            f"grad is {grad.dtype} {tuple(grad.shape)} with strides {grad.stride()}; it must be contiguous [E, "
            f"{', '.join(map(str, shape))}]" + (" and float32" if accumulate else "")
        )
