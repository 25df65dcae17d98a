"""Replica gradients come home in order; weights are packed for the way out."""

import pytest
import torch

from relibra_kernels.ops import pack_replicas, replica_reduce
from relibra_kernels.planner.errors import ShapeError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_in_shard_order_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4, 6, 10, generator=generator)
    shards = torch.randn(5, 6, 10, generator=generator).to(dtype)
    expert_of_shard = [2, 0, 2, -1, 2]
    expected = grad.clone()
    for shard, expert in enumerate(expert_of_shard):
        if expert >= 0:
            expected[expert] = expected[expert] + shards[shard].float()
    replica_reduce(grad, shards, torch.tensor(expert_of_shard, dtype=torch.int32))
    assert grad.equal(expected)


def test_no_shards_change_nothing():
    grad = torch.randn(4, 6)
    before = grad.clone()
    replica_reduce(grad, torch.empty(0, 6), torch.empty(0, dtype=torch.int64))
    assert grad.equal(before)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="must agree beyond their first axis"):
        replica_reduce(torch.zeros(4, 6), torch.zeros(1, 5), torch.tensor([0]))
    with pytest.raises(ShapeError, match="grad must be float32"):
        replica_reduce(torch.zeros(4, 6).bfloat16(), torch.zeros(1, 6), torch.tensor([0]))


def test_pack():
    weight = torch.randn(4, 6, 10)
    packed = pack_replicas(weight, torch.tensor([3, 0, 3]), torch.bfloat16)
    assert packed.equal(weight[[3, 0, 3]].bfloat16()) and packed.is_contiguous()
    assert pack_replicas(weight, torch.tensor([1])).dtype == torch.float32
