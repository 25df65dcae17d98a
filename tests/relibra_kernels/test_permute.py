"""Permute, the weighted sum back, and the plain sum back, against the definition in float64."""

import pytest
import torch
from routing import random_slots, routing_cases
from tolerance import RELATIVE, assert_close

from relibra_kernels.ops import build_schedule, permute, permute_backward, unpermute

CASES = routing_cases()
H = 40


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways(case, dtype):
    schedule = build_schedule(case.slots, case.num_slots)
    (tokens, top_k), used = case.slots.shape, int(schedule.slot_offsets[-1])
    x, weights = normal(tokens, H, dtype=dtype), normal(tokens, top_k, dtype=torch.float32, seed=1)

    rows = permute(x, schedule)
    source = schedule.assignment_of[:used].long() // top_k
    assert rows.shape == (tokens * top_k, H) and rows[:used].equal(x[source])

    y = normal(tokens * top_k, H, dtype=dtype, seed=2)
    y[used:] = float("nan")  # nothing may read the unused tail
    out, summed = unpermute(y, weights, schedule), permute_backward(y, schedule)
    expected_out, expected_sum = torch.zeros(2, tokens, H, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            row = int(schedule.position_of[t, k])
            if row >= 0:
                expected_out[t] += weights[t, k].double() * y[row].double()
                expected_sum[t] += y[row].double()
    assert_close(out, expected_out, RELATIVE[dtype], "unpermute")
    assert_close(summed, expected_sum, RELATIVE[dtype], "permute_backward")


def test_permute_then_the_sum_back_multiplies_by_top_k():
    x = normal(300, H, dtype=torch.float32)
    schedule = build_schedule(random_slots(300, 4, 16), 16)
    assert_close(permute_backward(permute(x, schedule), schedule), 4 * x, 1e-6)
