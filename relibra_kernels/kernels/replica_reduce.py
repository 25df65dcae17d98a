# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""Ordered fp32 sums of replica gradient shards into their owner's buffer, and packing weights for the push."""

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig
from ..operands import check_shards
from ..planner.errors import ShapeError
from .constants import block_of, ceil_div, chosen_block
from .launch import TABLES, launch


@triton.jit(do_not_specialize=["num_shards"], do_not_specialize_on_alignment=TABLES)
def _replica_reduce_kernel(
    grad_ptr, shards_ptr, expert_of_shard_ptr, num_shards, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one expert: read the sum, add its shards in order, write it. Without shards: nothing."""
    expert = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < SIZE
    total = tl.zeros([BLOCK], dtype=tl.float32)
    found = 0
    for shard in range(0, num_shards):
        if tl.load(expert_of_shard_ptr + shard).to(tl.int64) == expert:
            if found == 0:
                total = tl.load(grad_ptr + expert * SIZE + index, mask=inside, other=0.0)
            found += 1
            start = shards_ptr + tl.cast(shard, tl.int64) * SIZE
            total += tl.load(start + index, mask=inside, other=0.0).to(tl.float32)
    if found > 0:
        tl.store(grad_ptr + expert * SIZE + index, total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _pack_kernel(weight_ptr, experts_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts_ptr + place).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < SIZE
    values = tl.load(weight_ptr + expert * SIZE + index, mask=inside, other=0.0)
    tl.store(out_ptr + place * SIZE + index, values.to(tl.float32).to(out_ptr.dtype.element_ty), mask=inside)


def replica_reduce(
    grad: torch.Tensor, shards: torch.Tensor, expert_of_shard: torch.Tensor, *, config: BlockConfig | None = None
) -> None:
    """`grad[expert_of_shard[p]] += shards[p]` for p = 0, 1, ...: an ordered fp32 sum, in place.

    Args:
        grad: fp32 `[E, ...]`, the owner's buffer.
        shards: `[P, ...]` gradients of single experts, in the order in which they are to be added (rank order).
        expert_of_shard: integer `[P]`, which expert of `grad` each shard belongs to; -1 skips it.
    """
    check_shards(shards, grad, expert_of_shard)
    if len(shards):
        how = _constants(grad, config)
        grid = (ceil_div(how["SIZE"], how["BLOCK"]), len(grad))
        launch(_replica_reduce_kernel, grid, grad, shards, expert_of_shard, len(shards), **how)


def pack_replicas(
    weight: torch.Tensor,
    experts: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    config: BlockConfig | None = None,
) -> torch.Tensor:
    """`out[p] = weight[experts[p]]` as `dtype` (bf16 for the push), contiguous `[P, ...]`."""
    if not weight.is_contiguous():
        raise ShapeError(f"weight has strides {weight.stride()}; it must be contiguous")
    out = torch.empty(len(experts), *weight.shape[1:], dtype=dtype or weight.dtype, device=weight.device)
    if len(experts):
        how = _constants(weight, config)
        launch(_pack_kernel, (ceil_div(how["SIZE"], how["BLOCK"]), len(experts)), weight, experts, out, **how)
    return out


def _constants(tensor: torch.Tensor, config: BlockConfig | None) -> dict[str, int]:
    """How one expert of `tensor` `[E, ...]` is walked; both kernels move about as much a block."""
    size = tensor[0].numel()
    block, warps = block_of(config or chosen_block("replica_reduce", tensor, size, 1), size, tensor.element_size())
    return {"SIZE": size, "BLOCK": block, "num_warps": warps}
