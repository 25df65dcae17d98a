# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""From rows in slot order back to tokens, a weighted sum: one program a token, a row is read once.

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


def unpermute(
    y_RH: torch.Tensor,
    weights_TK: torch.Tensor | None,
    schedule: Schedule,
    *,
    out: torch.Tensor | None = None,
    config: BlockConfig | None = None,
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * y[position(t, k)]`; dropped assignments add nothing, weights None means 1.

    Args:
        out: [T, H], contiguous, where to write; new memory in y's dtype where None.
    """
    check_rows("y", y_RH, schedule.num_rows)
    if weights_TK is not None:
        check_gate_weights(weights_TK, schedule)
    width = y_RH.shape[1]
    out_TH = y_RH.new_empty(schedule.num_tokens, width) if out is None else out
    check_rows("out", out_TH, schedule.num_tokens)
    config = config or chosen_block("permute", y_RH, width, schedule.num_tokens, part="unpermute")
    block, warps = block_of(config, width, y_RH.element_size())
    how = {"H": width, "TOP_K": schedule.top_k, "BLOCK_H": block, "num_warps": warps}
    launch(_unpermute_kernel, (schedule.num_tokens,), y_RH, weights_TK, schedule.position_of, out_TH, **how)
    return out_TH
