"""`layers(model)` says who computes which MoE layer, and the way back from our kernels is to the bit."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
import transformers
from hf_families import FAMILIES, experts_modules, logits_and_gradients, make_model, make_tokens

import relibra_kernels.integrations.transformers as relibra
from relibra_kernels.planner.errors import InputError


def test_every_layer_says_who_computes_it():
    model = make_model("deepseek_v3", experts_implementation=None)
    assert [layer.computed_by for layer in relibra.layers(model)] == ["grouped_mm"] * len(FAMILIES["deepseek_v3"][2])
    model.set_experts_implementation("relibra")
    found = relibra.layers(model)
    assert [layer.layer_id for layer in found] == list(FAMILIES["deepseek_v3"][2])
    for layer in found:
        assert layer.is_ours and not layer.why_not and layer.name.endswith(f"{layer.layer_id}.mlp.experts")
        assert (layer.num_experts, layer.top_k) == (model.config.n_routed_experts, model.config.num_experts_per_tok)


def test_layers_that_are_taken_over_are_ours():
    model = make_model("qwen3_moe")
    assert not any(layer.is_ours for layer in relibra.layers(model))
    relibra.replace_moe_blocks(model)
    assert all(layer.is_ours for layer in relibra.layers(model))


def test_what_cannot_be_ours_says_why():
    model = make_model("qwen3_moe")
    experts_modules(model)[0].act_fn = torch.nn.Tanh()
    first, *others = relibra.layers(model)
    assert first.computed_by == "eager" and "act_fn Tanh" in first.why_not
    assert others and not any(layer.why_not for layer in others)


def test_a_dense_model_says_so():
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(InputError, match=r"LlamaForCausalLM without experts .*: it is dense, and has no MoE layer, or"):
        relibra.layers(transformers.LlamaForCausalLM(config))


def test_the_way_back_is_to_the_bit():
    """From the default, `grouped_mm`, whose bits are not those of `eager`."""
    model, tokens = make_model("qwen3_moe", experts_implementation=None), make_tokens()
    expected_logits, expected = logits_and_gradients(model, tokens)
    before = model.get_experts_implementation()
    model.set_experts_implementation("relibra")
    logits_and_gradients(model, tokens)
    assert all(layer.is_ours for layer in relibra.layers(model))
    model.set_experts_implementation(before)
    assert {layer.computed_by for layer in relibra.layers(model)} == {"grouped_mm"}
    logits, gradients = logits_and_gradients(model, tokens)
    assert logits.equal(expected_logits) and all(gradients[name].equal(expected[name]) for name in expected)
