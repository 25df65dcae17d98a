"""Adapters of experts: recorded, replayed, and under plans cut, moved, replicated and saved; PEFT's, and our own."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import checkpoint_activations, make_model, make_tokens, other_trace
from hf_under_plan import loss_of, prepared
from hf_under_plan import make_tokens as tokens_of_step
from lora_under_plan import RANK, alone, sharded, together, traces_of, wrapped
from ranks import Ranks
from tolerance import assert_close

from relibra_kernels import ops
from relibra_kernels.integrations.transformers import record_routing, replace_moe_blocks, replay
from relibra_kernels.integrations.transformers.moe_layers import moe_layers


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("take_over", [False, True])
def test_one_process_keeps_no_sum_of_weights_and_adapters(family, take_over, monkeypatch):
    """Nothing of a frozen weight's size is kept for backward but the weight, and no gradient of its size computed."""
    pytest.importorskip("peft", reason="needs peft")
    tokens = tokens_of_step(0)
    eager = wrapped(prepared(family))
    loss_of(eager, tokens).backward()
    model = prepared(family)
    if take_over:
        replace_moe_blocks(model)
    else:
        model.set_experts_implementation("relibra")
    model, made = wrapped(model), []
    weights = [p for p in model.parameters() if p.ndim == 3]
    own, sizes, kept = {p.data_ptr() for p in weights}, {p.shape for p in weights}, []
    assert len(own) == 4
    whole = ops.grad_weight
    monkeypatch.setattr(ops, "grad_weight", lambda *args, **how: (made.append(args[3].shape), whole(*args, **how)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss = loss_of(model, tokens)
    assert {t.data_ptr() for t in kept if t.shape in sizes} == own
    loss.backward()
    assert len(made) == 8 and all(RANK in shape for shape in made)
    expected = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(got[name], gradient, 1e-5, name)


@pytest.mark.parametrize("keep", [False, True], ids=["fetched", "kept"])
@pytest.mark.parametrize(
    ("how", "family"),
    [
        ("peft", "qwen3_moe"),
        ("peft", "gpt_oss"),
        ("peft after", "mixtral"),
        ("peft after", "gpt_oss"),
        ("own", "mixtral"),
        ("peft", "nemotron_h"),
        ("own", "nemotron_h"),
    ],
)
def test_adapters_train_under_plans_as_in_one_process(how, family, keep, ranks, tmp_path):
    """And a replica sends back the factors' gradients alone."""
    if how != "own":
        pytest.importorskip("peft", reason="needs peft")
    traces = traces_of(family)
    got = ranks.run(together, how, family, traces, keep, str(tmp_path / "checkpoint"))[0]
    for step, alone_ in enumerate(alone(how, family, traces)):
        expected = {
            name.removeprefix("base_model.model.") if how == "peft after" else name: g for name, g in alone_.items()
        }
        assert got[step].keys() == expected.keys()
        assert sum("experts" in name for name in expected) == 8  # A and B of two parameters of two layers
        for name, gradient in expected.items():
            assert_close(got[step][name], gradient, 1e-5, f"step {step}, {name}")


@pytest.mark.parametrize(("how", "family"), [("peft", "qwen3_moe"), ("peft after", "gpt_oss"), ("own", "mixtral")])
def test_adapters_train_beside_fsdp2(how, family, ranks):
    """FSDP2 shards the rest, adapters of attention among it; experts' adapters stay with their experts."""
    if how != "own":
        pytest.importorskip("peft", reason="needs peft")
    traces = traces_of(family)
    got, are_sharded = ranks.run(sharded, how, family, traces)[0]
    assert are_sharded == (0 if how == "own" else 4)  # A and B of q_proj in two layers
    for step, expected in enumerate(alone(how, family, traces)):
        after = how == "peft after"
        expected = {name.removeprefix("base_model.model.") if after else name: g for name, g in expected.items()}
        assert got[step].keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(got[step][name], gradient, 1e-5, f"step {step}, {name}")


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"])
def test_adapters_are_recorded_and_replayed(family, reentrant):
    """Generated and fed whole, with two micro-batches in flight."""
    pytest.importorskip("peft", reason="needs peft")

    def step(checkpointed):
        model = wrapped(make_model(family)).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        losses = []
        layers = moe_layers(model)
        for seed, tokens in enumerate((make_tokens(3, 9, 1), make_tokens(2, 7, 2))):
            numbers = tuple(layer.layer_id for layer in layers)
            other = other_trace([tokens.shape[1]] * len(tokens), seed, numbers)
            with replay(model, other, token_ids=tokens.tolist()), record_routing(model) as record:
                losses.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
            np.testing.assert_array_equal(record.trace(tokens.tolist()).expert_ids, other.expert_ids)
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, got = step(False), step(reentrant is not None)
    assert expected.keys() == got.keys() and sum("experts" in name for name in expected) >= 8
    for name, gradient in expected.items():
        assert_close(got[name], gradient, 1e-5, name)

    pytest.importorskip("peft", reason="needs peft")
    model, tokens = wrapped(make_model(family)).eval(), make_tokens(2, 6)
    with torch.no_grad(), record_routing(model) as record:
        out = model.generate(input_ids=tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    trace = record.trace(out.tolist())
    with torch.no_grad(), replay(model, trace, on_shift="refuse") as alignment:
        model(input_ids=out, use_cache=False)
    assert alignment.share == 1.0
