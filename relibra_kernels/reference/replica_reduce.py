"""Return replica gradients to their owner, and pack weights for the way out."""

import torch

from ..operands import check_shards


def replica_reduce(grad: torch.Tensor, shards: torch.Tensor, expert_of_shard: torch.Tensor) -> None:
    """`grad[expert_of_shard[p]] += shards[p]` for p = 0, 1, ...: an ordered fp32 sum, in place.

    Args:
        grad: fp32 `[E, ...]`, the owner's buffer.
        shards: `[P, ...]` gradients of single experts, in the order in which they are to be added (rank order).
        expert_of_shard: integer `[P]`, which expert of `grad` each shard belongs to; -1 skips it.
    """
    check_shards(shards, grad, expert_of_shard)
    for shard, expert in zip(shards, expert_of_shard.tolist(), strict=True):
        if expert >= 0:
            grad[expert].add_(shard)


def pack_replicas(weight: torch.Tensor, experts: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`out[p] = weight[experts[p]]` as `dtype` (bf16 for the push), contiguous `[P, ...]`."""
    return weight.index_select(0, experts).to(dtype or weight.dtype)
