"""What a model is fed: packed rows, shares, masks, caches, image tokens; and families with routers unlike others'."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import make_model, make_tokens, other_trace
from hf_rare_families import RARE, make_rare
from tolerance import assert_close

from relibra_kernels.integrations.megatron_shares import TokenShare
from relibra_kernels.integrations.transformers import record_routing, replay
from relibra_kernels.integrations.transformers.fed_tokens import fed_tokens
from relibra_kernels.integrations.transformers.moe_layers import moe_layers
from relibra_kernels.planner.errors import InputError, ShapeError

E, K = 8, 2
LAYERS = (0, 2)


def packed(lengths, tail=0, multiple=1, seed=0):
    """(input_ids [1, S], position_ids, cu_seq_lens, token ids of each)"""
    sequences = [make_tokens(1, n, seed=seed + n)[0] for n in lengths]
    ids, positions, bounds = [], [], [0]
    for one in sequences:
        fill = -len(one) % multiple
        ids += [one, torch.zeros(fill, dtype=torch.int64)]
        positions.append(torch.arange(len(one) + fill))
        bounds.append(bounds[-1] + len(one) + fill)
    ids.append(torch.zeros(tail, dtype=torch.int64))
    positions.append(torch.zeros(tail, dtype=torch.int64))
    return torch.cat(ids)[None], torch.cat(positions)[None], torch.tensor(bounds), [s.tolist() for s in sequences]


@pytest.mark.parametrize(("tail", "multiple"), [(0, 1), (5, 1), (0, 4), (4, 8)])
@pytest.mark.parametrize("told_by", ["positions", "offsets"])
def test_packed_rows_with_tails_record_and_replay(told_by, tail, multiple):
    model, lengths = make_model("qwen3_moe").eval(), [5, 9, 7]
    ids, positions, bounds, token_ids = packed(lengths, tail, multiple)
    options = {"position_ids": positions, "use_cache": False}
    if told_by == "offsets":
        options["cu_seq_lens_q"] = bounds
    trace = other_trace(lengths)
    with torch.no_grad(), record_routing(model) as record, replay(model, trace, token_ids=token_ids):
        model(ids, **options)
    np.testing.assert_array_equal(record.trace(token_ids).expert_ids, trace.expert_ids)
    with pytest.raises(InputError, match=r"has 4 tokens, but \d+ were fed"):
        record.trace([token_ids[0][:4], *token_ids[1:]])
    if multiple > 1:  # without their lengths, padding behind a sequence looks like more of it
        starts = bounds.tolist()
        rows = record.trace()
        for index, length in enumerate(lengths):
            np.testing.assert_array_equal(rows.sequence(index)[:length], trace.sequence(index))
        assert rows.num_sequences == len(starts) - 1
    longer = other_trace([5, 9 + multiple, 7])  # one more would be padding to the multiple
    with pytest.raises(InputError, match="feed them whole"), replay(model, longer, on_shift="ignore"):
        model(ids, **options)


@pytest.mark.parametrize("told_by", ["positions", "offsets"])
@pytest.mark.parametrize("lengths", [[5, 3, 1], [1, 1, 1], [4, 1, 1]])
def test_a_packed_sequence_of_one_token_is_not_lost(told_by, lengths, caplog):
    """At the end of a row it looks like padding, so that only token_ids can say what it is."""
    model = make_model("qwen3_moe").eval()
    ids, positions, bounds, token_ids = packed(lengths)
    options = {"position_ids": positions, "use_cache": False}
    if told_by == "offsets":
        options["cu_seq_lens_q"] = bounds
    trace = other_trace(lengths)
    with torch.no_grad(), record_routing(model) as record, replay(model, trace, token_ids=token_ids):
        model(ids, **options)
    np.testing.assert_array_equal(record.trace(token_ids).expert_ids, trace.expert_ids)
    assert "taken for padding" not in caplog.text
    surely = next(i for i in range(3, 0, -1) if i == 1 or lengths[i - 1] > 1)
    assert np.diff(record.trace().offsets).tolist() == lengths[:surely]
    assert f"{3 - surely} sequences of one token at the end of packed rows are taken for padding" in caplog.text
    if surely < 2:
        with pytest.raises(InputError, match="token_ids has 2 sequences, but 3 were recorded"):
            record.trace(token_ids[:2])


def test_shares_of_context_parallelism():
    model, lengths = make_model("qwen3_moe").eval(), [6, 9]
    trace = other_trace(lengths)
    for zigzag, size in ((True, 2), (False, 3)):
        seen = []
        for rank in range(size):
            rows = TokenShare(rank, size, zigzag=zigzag).packed_rows(trace)
            with torch.no_grad(), record_routing(model) as record, replay(model, trace, rows=rows, on_shift="ignore"):
                model(make_tokens(1, len(rows)), use_cache=False)
            np.testing.assert_array_equal(record.trace().expert_ids[rows >= 0], trace.expert_ids[rows[rows >= 0]])
            seen += rows[rows >= 0].tolist()
        assert sorted(seen) == list(range(15))
    assert TokenShare(0, 2).packed_rows(trace).tolist() == [0, 1, -1, -1, 6, 7, 8, -1, -1, -1]


def fed(mask, cached=0, length=4, batch=2):
    cache = SimpleNamespace(get_seq_length=lambda: cached)
    ids = torch.ones(batch, length, dtype=torch.int64)
    return fed_tokens((), {"input_ids": ids, "attention_mask": mask, "cache": cache}).real


def test_masks_of_every_form_say_the_same():
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    causal = torch.ones(4, 4).tril().bool()
    pairs = causal & real[:, None, None, :] & real[:, None, :, None]
    opened = pairs.clone()
    opened[0, 0, :2] = True  # transformers opens rows that would see nothing
    static = torch.zeros(2, 1, 4, 9, dtype=torch.bool)
    static[..., :4] = pairs
    additive = torch.where(static, 0.0, torch.finfo(torch.float32).min)
    sliding = pairs & ~torch.ones(4, 4).tril(-2).bool()
    for mask in (real.long(), real, pairs, opened, static, additive, sliding, pairs[:, 0],
                 {"full_attention": static, "sliding_attention": sliding}, {"sliding_attention": sliding}):  # fmt: skip
        np.testing.assert_array_equal(fed(mask), real)
    assert fed(None).all() and fed({"full_attention": None}).all() and fed(object()).all()
    step = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    step[..., 2:6] = True
    for mask in (step, torch.ones(2, 6), torch.ones(2, 9)):
        assert fed(mask, cached=5, length=1).all()
    with pytest.raises(ShapeError, match="attention_mask has shape"):
        fed(torch.ones(2, 3))


# ------------------------------------------------------------------------------------------------ caches
def test_a_cache_that_was_not_recorded_is_refused():
    model, tokens = make_model("qwen3_moe").eval(), make_tokens()
    with torch.no_grad():
        out = model(tokens[:, :5])
        name = "past_key_values" if "past_key_values" in out else "cache"
        with record_routing(model) as record, pytest.raises(InputError, match="5 tokens of 3 sequences whose routing"):
            model(tokens[:, 5:], **{name: out[name]})
        with record_routing(model) as record:
            out = model(tokens[:, :5])
            model(tokens[:, 5:], **{name: out[name]})
    assert np.diff(record.trace(tokens.tolist()).offsets).tolist() == [11] * 3


# ------------------------------------------------------------------------------------------------ families
@pytest.mark.parametrize("image", [slice(0, 0), slice(2, 5), slice(0, 9), slice(8, 9)])
def test_image_tokens_of_ernie_are_routed_live(image):
    """They go to experts of their own: unknown in a record, live in a replay, and text beside them is replayed."""
    model, tokens = make_rare("ernie4_5_vl_moe"), make_tokens(2, 9)
    kinds = torch.zeros(2, 9, dtype=torch.int32)
    kinds[1, image] = 1
    text = (kinds == 0).flatten().numpy()

    def logits():
        return model(input_ids=tokens, use_cache=False, moe_mm_token_type_ids=kinds)[0]

    with torch.no_grad():
        with record_routing(model) as record:
            expected = logits()
        trace = record.trace(tokens.tolist())
        np.testing.assert_array_equal(trace.unknown, ~text)
        with replay(model, trace, token_ids=tokens.tolist()) as alignment:
            assert_close(logits(), expected, 1e-6)
        assert alignment.share == 1.0
        other = other_trace([9, 9], 3, trace.moe_layer_ids)
        with record_routing(model) as record, replay(model, other, on_shift="ignore"):
            changed = logits()
        np.testing.assert_array_equal(record.trace().expert_ids[text], other.expert_ids[text])
        assert not torch.allclose(changed, expected)


def test_image_tokens_of_ernie_that_nobody_names_are_refused():
    model, tokens = make_rare("ernie4_5_vl_moe"), make_tokens(2, 9)
    kinds = torch.zeros(2, 9, dtype=torch.int32)
    kinds[1, 2:5] = 1
    trace = other_trace([9, 9], 3, tuple(layer.layer_id for layer in moe_layers(model)))
    said = pytest.raises(
        ShapeError, match=r"got 15 tokens, but the replay is for 18: image tokens go to experts of their"
    )
    with torch.no_grad(), said, replay(model, trace, rows=np.arange(18), on_shift="ignore"):
        model(input_ids=tokens, use_cache=False, moe_mm_token_type_ids=kinds)


@pytest.mark.parametrize("family", RARE)
def test_rare_families_record_and_replay(family):
    *_, layers, top_k, choices = RARE[family]
    model, tokens = make_rare(family), make_tokens(2, 9)
    with torch.no_grad(), record_routing(model) as record:
        expected = model(input_ids=tokens, use_cache=False)[0]
    trace = record.trace(tokens.tolist())
    assert (trace.top_k, trace.num_experts) == (top_k, choices)
    assert trace.moe_layer_ids == (layers or trace.moe_layer_ids)
    with torch.no_grad(), replay(model, trace) as alignment:
        assert_close(model(input_ids=tokens, use_cache=False)[0], expected, 1e-6)
    assert alignment.share == 1.0
    other = other_trace([9, 9], 3, trace.moe_layer_ids, choices, top_k)
    for training in (False, True):
        model.train(training)
        with record_routing(model) as record, replay(model, other, on_shift="ignore"):
            model(input_ids=tokens, use_cache=False)[0].float().square().sum().backward()
        np.testing.assert_array_equal(record.trace().expert_ids, other.expert_ids)
        assert all(any(p.grad is not None and p.grad.any() for p in layer.router.parameters())
                   for layer in moe_layers(model))  # fmt: skip
        model.zero_grad()
