"""Return replica gradients to their owner, and pack weights for the way out."""

import torch

from ..planner.errors import ShapeError


def replica_reduce(grad: torch.Tensor, shards: torch.Tensor, expert_of_shard: torch.Tensor) -> None:
    """`grad[expert_of_shard[p]] += shards[p]` for p = 0, 1, ...: an ordered fp32 sum, in place.

    Args:
        grad: fp32 `[E, ...]`, the owner's buffer.
        shards: `[P, ...]` gradients of single experts, in the order in which they are to be added (rank order).
        expert_of_shard: integer `[P]`, which expert of `grad` each shard belongs to; -1 skips it.
    """
    if grad.dtype not in (torch.float32, torch.float64) or shards.shape[1:] != grad.shape[1:]:
        raise ShapeError(
            f"grad is {grad.dtype} {tuple(grad.shape)} and shards {tuple(shards.shape)}; "
            "grad must be float32 and both must agree beyond their first axis"
        )
    for shard, expert in zip(shards, expert_of_shard.tolist(), strict=True):
        if expert >= 0:
            grad[expert].add_(shard)


def pack_replicas(weight: torch.Tensor, experts: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`out[p] = weight[experts[p]]` as `dtype` (bf16 for the push), contiguous `[P, ...]`."""
    return weight.index_select(0, experts).to(dtype or weight.dtype)
