"""A Qwen3-MoE model with our blocks: the same logits and gradients, the same parameters, the same state dict."""

import pytest
import torch
from tolerance import assert_close

from relibra_kernels.integrations.transformers import replace_moe_blocks
from relibra_kernels.nn import record_routing, replay_routing
from relibra_kernels.planner.errors import InputError

transformers = pytest.importorskip("transformers", reason="needs transformers")


def make_model():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=48,
        moe_intermediate_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        experts_implementation="eager",
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def loss_and_gradients(model, tokens):
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), gradients


def test_same_logits_gradients_and_state_dict():
    model, tokens = make_model(), torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(1))
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    expected_logits, expected = loss_and_gradients(model, tokens)
    blocks = replace_moe_blocks(model)
    assert len(blocks) == 2 and [model.model.layers[i].mlp for i in (0, 2)] == blocks
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    logits, gradients = loss_and_gradients(model, tokens)
    assert_close(logits, expected_logits, 1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("used_before", [True, False])
def test_router_logits_and_their_loss_are_still_collected(used_before):
    model, tokens = make_model(), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = (model if used_before else make_model())(tokens, labels=tokens, output_router_logits=True)
    replace_moe_blocks(model)
    got = model(tokens, labels=tokens, output_router_logits=True)
    assert len(got.router_logits) == 2
    for a, b in zip(got.router_logits, expected.router_logits, strict=True):
        assert_close(a, b, 1e-5)
    assert expected.aux_loss > 0
    assert_close(got.aux_loss, expected.aux_loss, 1e-5)


def test_recorded_routing_replays():
    model, tokens = make_model(), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    routers = [block.gate for block in replace_moe_blocks(model)]
    with record_routing(routers) as recorded:
        expected, _ = loss_and_gradients(model, tokens)
    indices = torch.stack([calls[0] for calls in recorded], dim=1)
    assert indices.shape == (18, 2, 2)
    with replay_routing(routers, indices):
        assert loss_and_gradients(model, tokens)[0].equal(expected)
    with replay_routing(routers, (indices + 1) % 8):
        assert not loss_and_gradients(model, tokens)[0].equal(expected)


def test_a_model_without_moe_blocks_is_refused():
    with pytest.raises(InputError, match="Linear"):
        replace_moe_blocks(torch.nn.Linear(2, 2))
