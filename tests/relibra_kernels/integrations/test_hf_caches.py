"""Caches whose rows change places (beams), or whose last tokens are taken back (drafts), in records and replays."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import make_model, make_tokens

from relibra_kernels.integrations.transformers import record_routing, replay
from relibra_kernels.planner.errors import InputError

REPEATING = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6]])  # drafts are looked up in it, and most are not chosen


def routing_of(model, token_ids):
    """[n, L, K] of a plain forward."""
    with torch.no_grad(), record_routing(model) as record:
        model(torch.tensor([token_ids]), use_cache=False)
    return record.trace([token_ids]).expert_ids


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_beams_that_change_places_keep_their_routing(family):
    model = make_model(family).eval()
    with record_routing(model) as record:
        out = model.generate(
            make_tokens(2, 7, seed=6), num_beams=3, num_return_sequences=3, max_new_tokens=6, do_sample=False
        )
        with pytest.raises(InputError, match="beams changed places"):
            record.trace()
    beams = [np.concatenate(sequence.token_ids).tolist() for sequence in record._sequences]
    trace = record.trace(beams)
    for index, token_ids in enumerate(beams):
        np.testing.assert_array_equal(np.sort(trace.sequence(index)), np.sort(routing_of(model, token_ids)))
    assert len(beams) == len(out) == 6
    with pytest.raises(InputError, match="beams changed places"):
        record.trace()


def test_a_copy_of_a_recorded_cache_is_reordered_by_itself():
    model, tokens = make_model("qwen3_moe").eval(), make_tokens()
    with torch.no_grad(), record_routing(model) as record:
        cache = model(tokens).past_key_values
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([2, 1, 0]))
        trace = record.trace()
    assert torch.equal(other.layers[0].keys, cache.layers[0].keys.flip(0))
    np.testing.assert_array_equal(trace.sequence(0), routing_of(model, tokens[0].tolist()))
    assert "reorder_cache" not in vars(cache)


def test_drafts_that_were_not_chosen_are_not_recorded():
    model = make_model("deepseek_v3").eval()
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 8, "do_sample": False}
    with record_routing(model) as record:
        out = model.generate(REPEATING, **options)
    token_ids = out.tolist()
    for trace in (record.trace(), record.trace(token_ids)):
        assert trace.offsets.tolist() == [0, len(token_ids[0])]
        np.testing.assert_array_equal(trace.expert_ids[:-1], routing_of(model, token_ids[0])[:-1])


def test_drafts_that_were_not_chosen_do_not_shift_a_replay():
    model = make_model("deepseek_v3").eval()
    with record_routing(model) as record:
        token_ids = model.generate(REPEATING, max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist()
    trace = record.trace(token_ids)
    with replay(model, trace), record_routing(model) as again:
        out = model.generate(REPEATING, prompt_lookup_num_tokens=4, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.tolist() == token_ids
    np.testing.assert_array_equal(again.trace(token_ids).expert_ids, trace.expert_ids)
