"""The weighted and the plain sum of rows by token, against the definition in float64."""

import pytest
import torch
from routing import routing_cases
from tolerance import RELATIVE, assert_close

from relibra_kernels.ops import build_schedule, unpermute

CASES = routing_cases()
H = 40


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_rows(case, dtype):
    schedule = build_schedule(case.slots, case.num_slots)
    (tokens, top_k), used = case.slots.shape, int(schedule.slot_offsets[-1])
    weights = normal(tokens, top_k, dtype=torch.float32, seed=1)
    y = normal(tokens * top_k, H, dtype=dtype, seed=2)
    y[used:] = float("nan")  # nothing may read the unused tail
    out, summed = unpermute(y, weights, schedule), unpermute(y, None, schedule)
    expected_out, expected_sum = torch.zeros(2, tokens, H, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            row = int(schedule.position_of[t, k])
            if row >= 0:
                expected_out[t] += weights[t, k].double() * y[row].double()
                expected_sum[t] += y[row].double()
    assert_close(out, expected_out, RELATIVE[dtype], "weighted sum")
    assert_close(summed, expected_sum, RELATIVE[dtype], "plain sum")


def test_tokens_that_nobody_computes_are_zero():
    """Also in memory that the caller gives, whatever is in it."""
    for slots in (torch.full((3, 2), -1), torch.tensor([[-1, -1], [0, -1], [-1, 1]])):
        schedule = build_schedule(slots, 2)
        y, out = torch.ones(schedule.num_rows, 8), torch.full((3, 8), 7.0)
        assert unpermute(y, None, schedule, out=out) is out
        assert out.equal((slots >= 0).sum(1, keepdim=True).float().expand(3, 8))
