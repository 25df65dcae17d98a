"""Recording and replay in eight families: what is replayed is what was recorded, with its gradients, or is refused."""

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import FAMILIES, checkpoint_activations, experts_modules, logits_and_gradients, make_model, make_tokens
from tolerance import assert_close

from relibra_kernels.integrations.transformers import record_routing, replace_moe_blocks
from relibra_kernels.integrations.transformers import replay as checked_replay
from relibra_kernels.planner import RoutingTrace
from relibra_kernels.planner.errors import InputError, ShapeError

E, K = 8, 2
replay = functools.partial(checked_replay, on_shift="ignore")  # of routing that the models would not choose


def random_trace(family, lengths, seed=0, last_unknown=False):
    """Routing that the model would hardly choose; where there are groups, of few enough of them."""
    layers = FAMILIES[family][2]
    random = np.random.default_rng(seed)
    ids = random.random((sum(lengths), len(layers), E)).argsort(-1)[..., :K].astype(np.int8)
    offsets = np.cumsum([0, *lengths])
    if last_unknown:
        ids[offsets[1:] - 1] = -1
    return RoutingTrace(ids, offsets, E, layers)


class Used:
    """The indices that every experts module was given."""

    def __init__(self, model):
        self.indices, self.weights = [], []
        self.hooks = [m.register_forward_pre_hook(self._see) for m in experts_modules(model)]

    def _see(self, _, args):
        self.indices.append(args[1])
        self.weights.append(args[2])

    def stacked(self):
        return torch.stack(self.indices, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_experts_are_used_in_every_layer(family):
    model, tokens = make_model(family), make_tokens()
    trace = random_trace(family, [11, 11, 11])
    used = Used(model)
    _, live = logits_and_gradients(model, tokens)
    used.indices.clear()
    with replay(model, trace, token_ids=tokens.tolist()):
        _, gradients = logits_and_gradients(model, tokens)
    assert used.stacked().equal(torch.from_numpy(trace.expert_ids.astype(np.int64)))
    assert all(weights.requires_grad and (weights != 0).all() for weights in used.weights)
    routers = [
        name for name in gradients if ("gate.weight" in name and "shared" not in name) or "router.weight" in name
    ]
    assert len(routers) == len(FAMILIES[family][2])
    assert all(gradients[name].any() and not gradients[name].equal(live[name]) for name in routers)

    used.indices.clear()
    _, again = logits_and_gradients(model, tokens)  # closed: live as before
    assert all(again[name].equal(live[name]) for name in live)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_of_what_was_recorded_changes_nothing(family):
    model, tokens = make_model(family), make_tokens()
    with record_routing(model) as record:
        expected_logits, expected = logits_and_gradients(model, tokens)
    trace = record.trace(token_ids=tokens.tolist())
    assert trace.moe_layer_ids == FAMILIES[family][2]
    assert trace.offsets.tolist() == [0, 11, 22, 33] and not trace.unknown.any()
    with replay(model, trace, token_ids=tokens.tolist()):
        logits, gradients = logits_and_gradients(model, tokens)
    assert_close(logits, expected_logits, 1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_tokens_are_routed_live(family):
    model, tokens = make_model(family), make_tokens(1, 9)
    with record_routing(model) as record:
        model(tokens, use_cache=False)
    live = record.trace()
    ids = random_trace(family, [9]).expert_ids
    ids[[2, 8]] = -1
    used = Used(model)
    with replay(model, RoutingTrace(ids, live.offsets, E, live.moe_layer_ids)):
        model(tokens, use_cache=False)
    known = np.setdiff1d(np.arange(9), [2, 8])
    first = used.stacked()[:, 0]  # only the first layer's input is as it was: it is routed before any replay
    np.testing.assert_array_equal(first[known], ids[known, 0])
    np.testing.assert_array_equal(first[[2]].sort().values, np.sort(live.expert_ids[[2], 0]))
    assert ((used.stacked() >= 0) & (used.stacked() < E)).all()


def test_the_gate_weights_are_the_scores_of_the_recorded_experts():
    model, tokens = make_model("deepseek_v2"), make_tokens(1, 9)
    ids = random_trace("deepseek_v2", [9]).expert_ids
    ids[:] = [0, 7]  # of two groups, which the router would often close
    used = Used(model)
    router = model.model.layers[1].mlp.gate
    logits = []
    router.register_forward_hook(lambda _m, _i, out: logits.append(out[0]))
    with replay(model, RoutingTrace(ids, np.array([0, 9]), E, (1, 2))):
        model(tokens, use_cache=False)
    assert_close(used.weights[0], logits[0].softmax(-1)[:, [0, 7]] * 1.5, 1e-6)


def test_padding_and_packing():
    model = make_model("qwen3_moe")
    lengths = [5, 9, 7]
    sequences = [make_tokens(1, n, seed=n)[0] for n in lengths]
    trace = random_trace("qwen3_moe", lengths, last_unknown=True)
    token_ids = [s.tolist() for s in sequences]
    used = Used(model)
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
        for b, s in enumerate(sequences):
            place = slice(9 - len(s), 9) if side == "left" else slice(len(s))
            ids[b, place], mask[b, place] = s, 1
        used.indices.clear()
        with replay(model, trace, token_ids=token_ids):
            model(ids, attention_mask=mask)
        got = used.stacked()[mask.flatten() == 1].numpy()
        np.testing.assert_array_equal(got[~trace.unknown], trace.expert_ids[~trace.unknown])
        with record_routing(model) as record, replay(model, trace):
            model(input_ids=ids, attention_mask=mask)
        np.testing.assert_array_equal(record.trace(token_ids).expert_ids, got)
    packed = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    used.indices.clear()
    with replay(model, trace, token_ids=token_ids):
        model(packed, position_ids=positions, use_cache=False)
    np.testing.assert_array_equal(used.stacked()[~trace.unknown], trace.expert_ids[~trace.unknown])
    used.indices.clear()
    rows = np.concatenate([[-1, -1], np.arange(21)[::-1]])
    with replay(model, trace, rows=rows):
        model(torch.cat([packed.new_zeros(1, 2), packed.flip(1)], 1))
    np.testing.assert_array_equal(
        used.stacked()[2:][~trace.unknown[::-1]], trace.expert_ids[::-1][~trace.unknown[::-1]]
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generate_records_and_replays(family):
    model = make_model(family).eval()
    prompts = make_tokens(3, 6)
    mask = torch.ones_like(prompts)
    prompts[1, :2], mask[1, :2] = 0, 0  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    free = model.generate(prompts, **options)
    model.generation_config.eos_token_id = int(free[0, 9])  # sequence 0 ends early, the others may
    with record_routing(model) as record:
        out = model.generate(prompts, **options)
    token_ids = []
    for b, (row, first) in enumerate(zip(out.tolist(), (0, 2, 0), strict=True)):
        completion = row[6:]
        eos = model.generation_config.eos_token_id
        end = completion.index(eos) + 1 if eos in completion else len(completion)
        token_ids.append([*row[first:6], *completion[:end]])
        assert b != 0 or end == 4
    trace = record.trace(token_ids)
    assert np.diff(trace.offsets).tolist() == [len(ids) for ids in token_ids]
    assert trace.only_last_tokens_unknown and trace.unknown.sum() >= 1
    np.testing.assert_array_equal(record.trace().expert_ids, trace.expert_ids)
    assert record.trace().offsets.tolist() == trace.offsets.tolist()

    for ids, expected in zip(token_ids, (trace.sequence(i) for i in range(3)), strict=True):  # what a forward chooses
        with record_routing(model) as alone:
            model(torch.tensor([ids]), use_cache=False)
        known = expected[:, 0, 0] >= 0
        np.testing.assert_array_equal(np.sort(alone.trace().expert_ids[known]), np.sort(expected[known]))

    ids = np.where(trace.expert_ids < 0, -1, (trace.expert_ids + 1) % E).astype(np.int8)
    other = RoutingTrace(ids, trace.offsets, E, trace.moe_layer_ids)
    for replayed in (trace, other):
        with record_routing(model) as again, replay(model, replayed):
            model.generate(prompts, **options)
        got = again._sequences[2].expert_ids
        np.testing.assert_array_equal(np.concatenate(got)[:13], replayed.sequence(2)[:13])
    with replay(model, trace, token_ids=token_ids):
        assert model.generate(prompts, **options).equal(out)
    with pytest.raises(InputError, match="was fed token"), replay(model, trace, token_ids=token_ids):
        model.generate(prompts.flip(1), attention_mask=mask, max_new_tokens=2)


def test_replaced_blocks_record_and_replay():
    model, tokens = make_model("qwen3_moe"), make_tokens()
    expected, _ = logits_and_gradients(model, tokens)
    replace_moe_blocks(model)
    with record_routing(model) as record:
        model(tokens)
    trace = record.trace(tokens.tolist())
    with replay(model, trace, token_ids=tokens.tolist()):
        assert_close(model(tokens).logits.detach(), expected, 1e-5)
    other = random_trace("qwen3_moe", [11] * 3)
    with record_routing(model) as record, replay(model, other):
        model(tokens)
    np.testing.assert_array_equal(record.trace().expert_ids, other.expert_ids)


def test_checkpointed_blocks_replay_again_and_are_recorded_once():
    model, tokens = make_model("qwen3_moe"), make_tokens()
    trace = random_trace("qwen3_moe", [11] * 3)
    with replay(model, trace):
        _, expected = logits_and_gradients(model, tokens)
    model.train()
    checkpoint_activations(model, use_reentrant=False)
    with record_routing(model) as record, replay(model, trace):
        _, gradients = logits_and_gradients(model, tokens)
    assert all(gradients[name].equal(expected[name]) for name in expected)
    assert record.trace().num_sequences == 3


def test_replay_under_torch_compile():
    tokens = make_tokens(2, 7)
    model = make_model("qwen3_moe", num_hidden_layers=1, mlp_only_layers=[])
    model.set_experts_implementation("relibra")
    ids = random_trace("qwen3_moe", [7, 7]).expert_ids[:, :1]
    trace = RoutingTrace(ids, np.array([0, 7, 14]), E, (0,))
    with replay(model, trace):
        expected, _ = logits_and_gradients(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with replay(model, trace, rows=np.arange(14)):
        assert_close(compiled(tokens, use_cache=False).logits.detach(), expected, 1e-6)


def one_changed(by):
    tokens = make_tokens()
    tokens[2, 4] += by
    return tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (make_tokens().roll(1, 1), r"was fed token \d+ at \[0, 0\], but .*\(sequence 0, position 0\)"),
        (make_tokens()[:2], r"rows of \[11, 11\] tokens"),
        (make_tokens()[:, :-1], r"rows of \[10, 10, 10\] tokens .*rows"),
        (make_tokens()[[0, 2, 1]], r"\(sequence 1, position"),
        (one_changed(1), r"at \[2, 4\], .*\(sequence 2, position 4\); 1 tokens differ"),
        (one_changed(-1), r"at \[2, 4\], .*\(sequence 2, position 4\); 1 tokens differ"),
    ],
    ids=["shifted", "a sequence is missing", "the last token is missing", "another order", "one above", "one below"],
)
def test_other_tokens_are_refused(tokens, message):
    model, trace = make_model("qwen3_moe"), random_trace("qwen3_moe", [11] * 3)
    with pytest.raises(InputError, match=message), replay(model, trace, token_ids=make_tokens().tolist()):
        model(tokens)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_does_not_fit_is_refused():
    model, trace = make_model("qwen3_moe"), random_trace("qwen3_moe", [11] * 3)
    ids, offsets = trace.expert_ids, trace.offsets
    for wrong, message in (
        (RoutingTrace(ids[:, :1], offsets, E, (0,)), r"\(1, 2, 8\); the model has \(2, 2, 8\)"),
        (RoutingTrace(ids, offsets, 16, (0, 2)), r"\(2, 2, 16\)"),
        (RoutingTrace(ids, offsets, E, (1, 2)), r"layers \(1, 2\); the model has experts in \(0, 2\)"),
    ):
        with pytest.raises(InputError, match=message), replay(model, wrong):
            pass
    with replay(model, RoutingTrace(ids, offsets, E, (0, 1))):  # numbers that nobody gave
        pass
    with pytest.raises(InputError, match=r"lengths \[11, 11\]"), replay(model, trace, token_ids=[[0] * 11] * 2):
        pass
    with pytest.raises(InputError, match=r"0\.\.32"), replay(model, trace, rows=np.arange(34)):
        pass
    with (
        pytest.raises(ShapeError, match="got 33 tokens, but the replay is for 5"),
        replay(model, trace, rows=np.arange(5)),
    ):
        model(make_tokens())
    with pytest.raises(InputError, match="Linear without experts"), replay(torch.nn.Linear(2, 2), trace):
        pass
    with record_routing(model) as record:
        pass
    with pytest.raises(InputError, match="nothing was recorded"):
        record.trace()
    with record_routing(model) as record:
        model(make_tokens(), use_cache=False)
    for token_ids, message in (
        (make_tokens()[:2], "has 2 sequences, but 3"),
        (make_tokens()[:, :-1], "sequence 0 has 10 tokens, but 11 were fed"),
        (make_tokens().roll(1, 1), "sequence 0 has"),
    ):
        with pytest.raises(InputError, match=message):
            record.trace(token_ids.tolist())


def test_a_router_without_topk_is_refused():
    model, trace = make_model("mixtral"), random_trace("mixtral", [11] * 3)
    router = model.model.layers[1].mlp.gate

    def by_sorting(x):
        logits = x.reshape(-1, x.shape[-1]) @ router.weight.T
        weights, indices = logits.softmax(-1).sort(descending=True)
        return logits, weights[:, :K], indices[:, :K]

    router.forward = by_sorting
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts .* with torch.topk"), replay(model, trace):
        model(make_tokens())
    assert router.forward is by_sorting
