"""What stands beside a record (masks, lengths, starts, layers, lines), in the forms that trainers and users give it."""

import numpy as np
import pytest
import torch
from records import in_place, random_ids

from relibra_kernels.planner import (
    FormatError,
    InputError,
    ReLibraError,
    ShapeError,
    from_megatron,
    from_megatron_lines,
    from_nemo_rl,
    from_prime_rl,
    from_sglang,
    from_slime,
    from_verl,
    from_vllm,
)
from relibra_kernels.planner.trace_report import LAST_TOKEN, MASKED

L, K, E = 3, 2, 16
LOADERS = {
    "vllm": from_vllm,
    "sglang": lambda records, experts, **options: from_sglang(records, experts, num_layers=L, top_k=K, **options),
    "slime": from_slime,
    "prime-rl": from_prime_rl,
    "nemo-rl": from_nemo_rl,
    "verl": from_verl,
}


def rows(tokens, seed=0):
    return random_ids(np.random.default_rng(seed), tokens, L, K, E).astype(np.int16)


@pytest.mark.parametrize("name", ["num_tokens", "token_ids"])
def test_a_response_mask_counts_from_the_end_of_the_sequence_not_of_its_rows(name):
    """verl's rows may lack the last token's, so that their number is not the sequence's."""
    ids = rows(6)
    ids[3] = 0  # a tool result
    lengths = {"num_tokens": np.array([7]), "token_ids": [range(7)]}
    mask = np.array([1, 0, 1, 1, 1])  # tokens 2 to 6
    for entry in (ids, {"routed_experts": ids}, [ids[:2], ids[2:]]):
        trace = from_verl([entry], E, response_mask=[mask], **{name: lengths[name]})
        assert trace.reasons.tolist() == [0, 0, 0, MASKED, 0, 0, LAST_TOKEN]
    ids[3], ids[2] = ids[4], 0  # missing, and generated
    with pytest.raises(InputError, match="sequence 0 has no routing for 1 tokens, the first is token 2"):
        from_verl([ids], E, response_mask=[mask], **{name: lengths[name]})


def test_padded_masks_beside_jagged_rows_are_read_through_the_attention_mask():
    """verl unpads the ids and the routing of a batch, and keeps `response_mask` and `attention_mask` padded."""
    prompts, answers, width = (3, 2), (4, 6), 6
    attention, response = np.zeros((2, 4 + width), np.int64), np.zeros((2, width), np.int64)
    sequences = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        attention[i, 4 - prompt : 4 + answer], response[i, :answer] = 1, 1
        sequences.append(in_place(rows(prompt + answer - 1, seed=i), 0))
    response[0, 1] = 0
    sequences[0][4] = 0  # the tool result
    jagged = torch.nested.as_nested_tensor([torch.from_numpy(ids) for ids in sequences], layout=torch.jagged)
    masks = {"attention_mask": torch.from_numpy(attention), "response_mask": torch.from_numpy(response)}
    trace = from_verl(jagged, E, **masks)
    assert trace.reasons.tolist() == [0, 0, 0, 0, MASKED, 0, LAST_TOKEN] + [0] * 7 + [LAST_TOKEN]
    replayed = np.ones_like(attention)
    replayed[1, 5] = 0  # its token 3
    trace = from_verl(jagged, E, replay_mask=replayed, **masks)
    assert trace.reasons[7:].tolist() == [0] * 3 + [MASKED] + [0] * 3 + [LAST_TOKEN]
    with pytest.raises(ShapeError, match=r"response_mask has shape .2, 6., but routed_experts is a list: give the att"):
        from_verl(jagged, E, response_mask=response)
    attention[1, -1] = 0
    with pytest.raises(InputError, match="sequence 1 has 8 rows, but its 7 tokens need 7"):
        from_verl([sequences[0], rows(8)], E, attention_mask=attention, response_mask=response)


def test_a_response_longer_than_its_sequence_is_refused():
    with pytest.raises(ShapeError, match="response_mask has 9 tokens, but its sequence has 5"):
        from_verl([rows(5)], E, response_mask=[np.ones(9)])
    with pytest.raises(ShapeError, match="response_mask has 1 entries, but routed_experts has 2 sequences"):
        from_verl([rows(5), rows(5)], E, response_mask=[np.ones(3)])


def test_padding_may_be_zeros_in_some_rows_and_minus_one_in_others():
    ids = np.concatenate([np.zeros((1, L, K), np.int16), np.full((1, L, K), -1, np.int16), in_place(rows(3), 0)])
    trace = from_verl(ids[None], E, attention_mask=[[0, 0, 1, 1, 1, 1]])
    assert trace.reasons.tolist() == [0, 0, 0, LAST_TOKEN]
    tail = np.concatenate([rows(3), ids[:2]])
    assert from_verl(tail, E, cu_seqlens=[0, 3]).num_tokens == 3


@pytest.mark.parametrize("engine", LOADERS)
def test_arguments_of_another_kind_are_refused_by_name(engine):
    load, ids = LOADERS[engine], rows(5)
    for options, named in (
        ({"starts": {"a": 1}}, "starts"),
        ({"masks": {"a": 1}}, "masks"),
        ({"masks": 3}, "masks"),
        ({"replay_masks": "ab"}, "replay_masks"),
        ({"num_tokens": [5.5]}, "5.5"),
        ({"num_tokens": ["5"]}, "'5'"),
        ({"num_tokens": [1 << 62], "starts": [0], "holes": "unknown"}, "memory"),
        ({"moe_layer_ids": [0.5, 1.5]}, "moe_layer_ids"),
        ({"moe_layer_ids": "012"}, "moe_layer_ids"),
        ({"moe_layer_ids": [True, False, True]}, "moe_layer_ids"),
    ):
        with pytest.raises(ReLibraError, match=named):
            load([ids], E, **options)
    for nothing in (None, 5):
        with pytest.raises(ReLibraError, match=r"must|needs attention_mask"):
            load(nothing, E)


@pytest.mark.parametrize("engine", ["prime-rl", "verl"])
def test_rows_that_say_where_they_begin_do_not_say_where_they_end(engine):
    """These may have a row for the last token or not, so that only a length tells how long the sequence is."""
    entry = {"routed_experts": rows(5), "start": 3}
    assert LOADERS[engine]([entry], E, holes="unknown").report.assumed
    assert not LOADERS[engine]([entry], E, num_tokens=[9], holes="unknown").report.assumed


def test_megatron_lines_whose_table_is_no_tokens_by_topk_are_refused():
    """Cut anew, [6][2] with topk 4 would be three tokens, each with two tokens' experts."""
    ids = np.arange(12).reshape(6, 2)
    line = {"step": 0, "layer": 0, "rank": 0, "num_tokens": 6, "topk": 2, "top_indices": ids.tolist()}
    assert from_megatron_lines([line], E).num_tokens == 6
    for wrong in (
        {"topk": 4, "num_tokens": 3},
        {"top_indices": ids.reshape(-1).tolist()},
        {"step": 0.5},
        {"layer": 1.5},
        {"topk": "2"},
    ):
        with pytest.raises(FormatError, match="line 1 must have integers"):
            from_megatron_lines([line | wrong], E)
    for lengths in ([2.5, 4.5], ["2", "4"]):
        with pytest.raises(InputError, match="sequence_lengths is"):
            from_megatron([ids], E, sequence_lengths=lengths)
    with pytest.raises(InputError, match="moe_layer_ids"):
        from_megatron([ids], E, moe_layer_ids=[0.5])
    for load in (from_megatron, from_megatron_lines):
        with pytest.raises(ReLibraError, match="None"):
            load(None, E)
