"""Bad input to the expert-parallel runtime: a clear error on every rank, and nothing has moved."""

import re

import pytest
import torch
from ep_refusals import dense_weights_that_may_differ, other_experts_in_one_copy, refusal, weights_that_differ_later

from relibra_kernels.parallel import digests

MOVES_FIRST = {  # what is found only once the batch runs, under the new placement
    "too_few_tokens",
    "rows_leave_one_out",
    "rows_out_of_range",
    "micro_batch_out_of_range",
    "micro_batch_not_an_integer",
    "batch_inside_of_batch",
    "forward_outside_of_micro_batch",
    "other_micro_batch_on_one_rank",
    "backward_after_the_batch",
    "recomputed_under_other_hooks",
    "routed_otherwise",
    "checkpoint_within_batch",
}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("another_model", "PlanError", "plan is for model 'other'; this is 'toy'"),
        ("other_loads", "PlanError", "made for other loads"),
        ("other_cluster", "PlanError", r"\(3, 8, 2, 1\); this run has \(3, 8, 2, 2\)"),
        ("other_plan_on_one_rank", "InputError", r"the plan of rank \d differs"),
        ("unknown_in_the_middle", "PlanError", "made for other loads"),
        ("other_layers", "InputError", r"trace has \(layers, top-k, experts\) \(2, 2, 8\); the model has \(3, 2, 8\)"),
        ("too_few_tokens", "ShapeError", "recorded has"),
        ("rows_leave_one_out", "InputError", "name row 0 0 times"),
        ("rows_out_of_range", "InputError", "span 1.."),
        ("micro_batch_out_of_range", "InputError", r"index is 2; the plan has micro-batches 0..1"),
        ("micro_batch_not_an_integer", "InputError", "index is '0'"),
        ("micro_batch_outside_of_batch", "InputError", "outside of batch"),
        ("forward_outside_of_micro_batch", "InputError", "outside of a micro-batch"),
        ("batch_inside_of_batch", "InputError", "open already"),
        ("optimizer_state_of_another_shape", "InputError", r"optimizer state 'rows' of gate_up_proj has shape \(3,\)"),
        ("optimizer_state_on_one_rank", "InputError", r"the optimizer's state of rank \d differs"),
        ("optimizer_made_too_early", "InputError", "optimizer does not have gate_up_proj of MoE layer 0"),
        ("other_number_of_micro_batches_on_one_rank", "InputError", r"num_micro_batches of rank \d differs"),
        ("sharded_twice", "InputError", "must have all of its experts"),
        ("wrong_group_size", "InputError", "cluster has 4 ranks, the process group 2"),
        ("fewer_experts_than_ranks", "InputError", "1 experts are fewer than the 2 ranks"),
        ("other_micro_batch_on_one_rank", "InputError", r"rank \d opened micro-batch \d and rank \d micro-batch \d"),
        ("other_placement_on_one_rank", "InputError", "the placement of rank 1 differs from rank 0's"),
        (
            "other_dense_weight_on_one_rank",
            "InputError",
            r"parameter moe.2.gate.weight of rank 1 differs from rank 0's",
        ),
        ("other_dense_parameters_on_one_rank", "InputError", "the list of dense parameters of rank 1 differs"),
        ("other_options_on_one_rank", "InputError", "the configuration of rank 1 differs from rank 0's"),
        (
            "backward_after_the_batch",
            "InputError",
            "backward of layer 2, micro-batch 0 runs after its batch",
        ),
        ("recomputed_under_other_hooks", "InputError", "does not say for which micro-batch"),
        ("routed_otherwise", "InputError", "1 tokens of one layer and micro-batch were routed to other experts"),
        ("optimizer_state_that_is_a_list", "InputError", "optimizer state 'history' of gate_up_proj is a list"),
        ("master_of_another_shape", "InputError", r"the master of down_proj has shape \(3,\)"),
        ("negative_option", "InputError", "spare_rows is -1"),
        ("mesh_without_ep", "InputError", r"mesh has 2 dimensions, named \('dp', 'tp'\)"),
        ("mesh_of_three", "InputError", r"mesh has 3 dimensions, named \('pp', 'copies', 'ep'\)"),
        ("mesh_with_pp", "InputError", "dimension 'pp' beside 'ep', but pipeline parallelism is not supported"),
        ("mesh_with_tp", "InputError", "dimension 'tp' beside 'ep', but tensor parallelism is not supported"),
        ("mesh_with_cp", "InputError", "dimension 'cp' beside 'ep', but context parallelism is not supported"),
        ("mesh_with_sp", "InputError", "dimension 'sp' beside 'ep', but sequence parallelism is not supported"),
        ("experts_sharded_before", "InputError", "gate_up_proj of MoE layer 1 is a DTensor .* before fully_shard"),
        ("unknown_reduction", "InputError", "reduction is 'median'"),
        ("checkpoint_within_batch", "InputError", "save_checkpoint is used within a batch"),
        ("stats_before_a_batch", "InputError", "there was none yet"),
        ("no_moe", "InputError", "model Linear has no ReplicatedMoE"),
    ],
)
def test_refused(ranks, name, kind, words):
    for got_kind, message, changed in ranks(2).run(refusal, name):
        assert got_kind == kind, message
        assert re.search(words, message), message
        assert changed == (name in MOVES_FIRST) or name == "other_placement_on_one_rank"  # which changes it itself


@pytest.mark.parametrize("name", ["other_layers_on_one_rank", "other_model_on_one_rank"])
def test_what_one_rank_refuses_stops_all(ranks, name):
    """At once, not after a time-out: the others name the rank whose error says why."""
    (_, own, _), (kind, message, changed) = ranks(2).run(refusal, name)
    assert "trace has (layers" in own or "plan is for model" in own
    assert kind == "InputError" and "rank 0 stopped" in message
    assert not changed


def test_copies_of_experts_are_the_same(ranks):
    """Ranks 1 and 3 own the same experts; the others hear of it."""
    messages = ranks(4).run(other_experts_in_one_copy, 3)
    for rank in (1, 3):
        assert "parameter moe.1.experts.down_proj of rank 3 differs from rank 1's" in messages[rank]
    for rank in (0, 2):
        assert f"rank {rank + 1} stopped comparing the weights" in messages[rank]


def test_ranks_may_hold_parts_of_dense_weights(ranks):
    assert all(ranks(2).run(dense_weights_that_may_differ))


def test_weights_are_compared_once(ranks):
    assert all(ranks(2).run(weights_that_differ_later))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.bool])
def test_a_digest_is_of_the_bits(dtype):
    random = torch.Generator().manual_seed(0)
    tensor = (torch.rand(7, 600, generator=random) * 200).to(dtype)
    chunks, digests.CHUNK = digests.CHUNK, 1000
    try:
        expected = int(digests.digest(tensor))
        assert int(digests.digest(tensor.t().contiguous().t())) == expected
    finally:
        digests.CHUNK = chunks
    assert int(digests.digest(tensor)) == expected
    values = (
        tensor.contiguous().view(torch.uint8).numpy().view(f"{'u' if dtype.itemsize == 1 else 'i'}{dtype.itemsize}")
    )
    exact = sum((2 * i + 1) * int(value) for i, value in enumerate(values.reshape(-1)))
    assert (expected - exact) % 2**64 == 0
    swapped = tensor.clone()
    swapped[3, 5], swapped[5, 3] = tensor[5, 3], ~tensor[3, 5] if dtype == torch.bool else tensor[3, 5] + 1
    assert int(digests.digest(swapped)) != expected
    assert int(digests.digest(tensor[:0])) == 0
