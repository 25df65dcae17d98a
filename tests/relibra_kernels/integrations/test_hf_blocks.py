"""A model whose experts were taken over: the same logits and gradients, the same parameters, the same state dict."""

import copy
import io
import pickle

import pytest
import torch
from tolerance import assert_close

from relibra_kernels.integrations.transformers import record_routing, replace_moe_blocks
from relibra_kernels.nn import ReplicatedExperts
from relibra_kernels.planner.errors import InputError, ShapeError

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
    layers = replace_moe_blocks(model)
    assert [layer.experts for layer in layers] == [model.model.layers[i].mlp.experts for i in (0, 2)]
    assert all(isinstance(layer.experts, ReplicatedExperts) for layer in layers)
    assert replace_moe_blocks(model) == layers
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


def test_routers_choose_what_they_are_given_and_go_live_where_that_is_unknown():
    model, tokens = make_model(), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    layers = replace_moe_blocks(model)
    with record_routing(model) as record:
        expected, _ = loss_and_gradients(model, tokens)
    ids = torch.from_numpy(record.trace().expert_ids.astype("int64"))
    assert ids.shape == (18, 2, 2)

    def replayed(indices, complete=True):
        for index, layer in enumerate(layers):
            layer.router.replay = lambda index=index: (indices[:, index], complete)
        return loss_and_gradients(model, tokens)[0]

    assert_close(replayed(ids), expected, 1e-6)
    assert not replayed((ids + 1) % 8).equal(expected)
    ids[3:7] = -1
    assert_close(replayed(ids, complete=False), expected, 1e-6)
    with pytest.raises(ShapeError, match="got 18 tokens; its replay is for 17"):
        replayed(ids[:17])


def copied(model):
    yield "pickle", pickle.loads(pickle.dumps(model))
    yield "deepcopy", copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield "torch.save", torch.load(file, weights_only=False)


def test_copies_are_models_of_their_own():
    model, tokens = make_model(), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    replace_moe_blocks(model)
    expected, _ = loss_and_gradients(model, tokens)
    for how, twin in copied(model):
        assert loss_and_gradients(twin, tokens)[0].equal(expected), how
        layers = replace_moe_blocks(twin)
        mine = {id(module) for module in twin.modules()}
        assert all(id(layer.experts) in mine and id(layer.router.module) in mine for layer in layers), how
        layers[0].router.replay = lambda: (torch.tensor([[6, 7]] * 18), True)
        assert not loss_and_gradients(twin, tokens)[0].equal(expected), how
        assert loss_and_gradients(model, tokens)[0].equal(expected), how


def test_a_model_without_memory_is_taken_over_and_filled_later():
    source, tokens = make_model(), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(source.config)
    layers = replace_moe_blocks(model)
    assert all(p.is_meta for layer in layers for p in layer.experts.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)  # its buffer is in no state dict
    assert_close(loss_and_gradients(model, tokens)[0], loss_and_gradients(source, tokens)[0], 1e-5)


def test_a_model_without_moe_blocks_is_refused():
    with pytest.raises(InputError, match="Linear"):
        replace_moe_blocks(torch.nn.Linear(2, 2))
