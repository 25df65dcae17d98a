"""Parts of kernels whose form depends on the device, in all forms."""

import pytest
import torch
import triton
import triton.language as tl

from relibra_kernels.kernels.tiles import bias_row


@triton.jit
def _bias_kernel(home_ptr, replica_ptr, out_ptr, num_home, SIZE: tl.constexpr, XCDS: tl.constexpr):
    weight = tl.program_id(0)
    column = tl.arange(0, 16)
    inside = column < SIZE
    row = bias_row(home_ptr, replica_ptr, weight, num_home, column, inside, SIZE, XCDS)
    tl.store(out_ptr + weight * SIZE + column[None, :], row, mask=inside[None, :])


@pytest.mark.parametrize("xcds", [1, 8])
@pytest.mark.parametrize("replicas", [0, 2])
def test_a_bias_of_either_store(replicas, xcds):
    home, replica = torch.randn(3, 11).bfloat16(), torch.randn(replicas, 11).bfloat16()
    out = torch.full((3 + replicas, 11), torch.nan)
    _bias_kernel[(3 + replicas,)](home, replica if replicas else None, out, 3, SIZE=11, XCDS=xcds)
    assert torch.equal(out, torch.cat([home, replica]).float())
