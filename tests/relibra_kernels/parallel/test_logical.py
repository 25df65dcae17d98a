"""Experts in logical order, gathered from all ranks: some at a time, one tensor at once, those that are asked for."""

import pytest

pytest.importorskip("safetensors")
from ep_gathered import gathered_by_name, gathered_in_parts, gathered_tensors, memory_to_gather
from ranks import one_rank


@pytest.mark.parametrize("experts", [8, 34])
def test_experts_are_gathered_some_at_a_time(ranks, experts):
    assert ranks(2).run(gathered_in_parts, experts) == [True] * 2


def test_gathering_takes_the_memory_of_one_tensor():
    """And of eighths of it: the part before, the part that comes, and that in logical order."""
    with one_rank():
        assert 1 < memory_to_gather(64) <= 1.375


def test_only_what_is_asked_for_is_gathered(ranks):
    names = ["embedding.weight", "moe.1.experts.down_proj"]
    for found, right, collectives, refused in ranks(2).run(gathered_by_name, names):
        assert found == names and right
        assert collectives == 4  # a slot of all ranks at a time
        assert refused == "names has 'moe.9.experts.down_proj', but the model has no parameter of that name"


def test_small_and_large_tensors_are_gathered(ranks):
    assert ranks(3).run(gathered_tensors) == [[True, True]] * 3
