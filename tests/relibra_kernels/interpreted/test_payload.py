"""Payload rows packed and unpacked by the kernels: to the bit, gradients to a rounding."""

import pytest
import torch
from payload_cases import check_both_ways
from tolerance import RELATIVE, assert_close

from relibra_kernels import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "ranks"), [(0, 2, 2), (1, 1, 1), (7, 3, 2), (20, 8, 4), (9, 6, 1)])
def test_both_ways(tokens, top_k, ranks, dtype):
    got, expected = check_both_ways(kernels, tokens, top_k, ranks, 40, dtype)
    assert_close(got, expected, RELATIVE[dtype])


def test_rows_longer_than_a_block():
    got, expected = check_both_ways(kernels, 3, 2, 2, 2880, torch.float16)
    assert_close(got, expected, RELATIVE[torch.float16])
