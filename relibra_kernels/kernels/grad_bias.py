# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""`grad[w] += sum over the rows r of w's slots of weight(r) * rows[r]`: the gradient of a bias.

A program sums a block of columns of one weight, over that weight's slots in order and their rows in order.
"""

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig
from ..operands import check_grad
from ..schedule import Schedule
from .constants import ceil_div, chosen_block, next_power_of_2
from .launch import TABLES, launch
from .tiles import slots_of


@triton.jit
def _put(at, total, inside, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total.to(at.dtype.element_ty), mask=inside)


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
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    weight = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    found = 0
    first_slot, last_slot = slots_of(weight, num_slots, weight_of_slot_ptr, SLOTS)
    for slot in range(first_slot, last_slot):
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
        # a branch: Triton 3.6 fails on a choice between the stores' pointers for gfx942
        if replica_grad_ptr is None:  # noqa: SIM114 (decided when it is compiled)
            _put(grad_ptr + weight.to(tl.int64) * N + column, total, inside, ACCUMULATE)
        elif weight < num_home:
            _put(grad_ptr + weight.to(tl.int64) * N + column, total, inside, ACCUMULATE)
        else:
            _put(replica_grad_ptr + (weight - num_home).to(tl.int64) * N + column, total, inside, ACCUMULATE)


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
    block = min(config.columns, next_power_of_2(n))
    weights = len(grad) + (0 if replica_grad is None else len(replica_grad))
    launch(
        _grad_bias_kernel,
        (weights, ceil_div(n, block)),
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
        SLOTS=next_power_of_2(slots),
        BLOCK_R=config.rows,
        BLOCK_N=block,
        num_warps=config.num_warps,
    )
