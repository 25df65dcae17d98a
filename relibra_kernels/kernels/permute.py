# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""Rows into slot order, and the weighted sum back: one program a token, a row is read once.

A program walks its token's row in blocks of BLOCK_H, so that every access is a run of 16-byte pieces; hidden sizes that
are no multiple of it end in a masked block. Sums are in fp32 in the order of k: no atomics.
"""

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig
from ..operands import check_gate_weights, check_rows
from ..schedule import Schedule
from .constants import block_of, chosen_block
from .launch import TABLES, launch


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _permute_kernel(x_ptr, position_ptr, rows_ptr, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        x = tl.load(x_ptr + token * H + column, mask=inside, other=0.0)
        for k in tl.static_range(TOP_K):
            row = tl.load(position_ptr + token * TOP_K + k).to(tl.int64)
            tl.store(rows_ptr + row * H + column, x, mask=inside & (row >= 0))


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _unpermute_kernel(
    y_ptr, weights_ptr, position_ptr, out_ptr, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            row = tl.load(position_ptr + token * TOP_K + k).to(tl.int64)
            y = tl.load(y_ptr + row * H + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
            if weights_ptr is not None:
                y *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
            total += y
        tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def permute(x_TH: torch.Tensor, schedule: Schedule, *, config: BlockConfig | None = None) -> torch.Tensor:
    """`rows[r] = x[token of r]`, `[rows, H]`. Rows of the unused tail are undefined."""
    check_rows("x", x_TH, schedule.num_tokens)
    rows_RH = x_TH.new_empty(schedule.num_rows, x_TH.shape[1])
    how = _constants("permute", x_TH, schedule, config)
    launch(_permute_kernel, (x_TH.shape[0],), x_TH, schedule.position_of, rows_RH, **how)
    return rows_RH


def permute_backward(drows_RH: torch.Tensor, schedule: Schedule, *, config: BlockConfig | None = None) -> torch.Tensor:
    """`dx[t] = sum_k drows[position(t, k)]`."""
    return unpermute(drows_RH, None, schedule, config=config)


def unpermute(
    y_RH: torch.Tensor, weights_TK: torch.Tensor | None, schedule: Schedule, *, config: BlockConfig | None = None
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * y[position(t, k)]`; dropped assignments add nothing, weights None means 1."""
    check_rows("y", y_RH, schedule.num_rows)
    if weights_TK is not None:
        check_gate_weights(weights_TK, schedule)
    out_TH = y_RH.new_empty(schedule.num_tokens, y_RH.shape[1])
    how = _constants("unpermute", y_RH, schedule, config)
    launch(_unpermute_kernel, (schedule.num_tokens,), y_RH, weights_TK, schedule.position_of, out_TH, **how)
    return out_TH


def _constants(part: str, rows: torch.Tensor, schedule: Schedule, config: BlockConfig | None) -> dict[str, int]:
    """How the rows of one of the two kernels are walked."""
    width = rows.shape[1]
    config = config or chosen_block("permute", rows, width, schedule.num_tokens, part=part)
    block, warps = block_of(config, width, rows.element_size())
    return {"H": width, "TOP_K": schedule.top_k, "BLOCK_H": block, "num_warps": warps}
