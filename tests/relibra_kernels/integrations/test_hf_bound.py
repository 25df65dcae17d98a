"""A replay is bound to its forward: late backward, checkpointing, several in flight, shifts."""

import copy
import logging
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import checkpoint_activations, loss_of, make_model, make_tokens, other_trace
from tolerance import assert_close

from relibra_kernels.integrations.transformers import record_routing, replay
from relibra_kernels.integrations.transformers.moe_layers import moe_layers
from relibra_kernels.planner import RoutingTrace
from relibra_kernels.planner.errors import InputError

E, K = 8, 2
LAYERS = (0, 2)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def forward(model, tokens, seed):
    with replay(model, other_trace([11] * 3, seed), token_ids=tokens.tolist()):
        return loss_of(model, tokens)


@pytest.fixture(params=["plain", "reentrant", "not reentrant"])
def checkpointed(request):
    """(model, a model that keeps everything)"""
    model = make_model("qwen3_moe").train()
    expected = copy.deepcopy(model)
    if request.param != "plain":
        checkpoint_activations(model, use_reentrant=request.param == "reentrant")
    return model, expected


def test_backward_after_the_block_and_out_of_order(checkpointed):
    model, plain = checkpointed
    a, b = make_tokens(seed=1), make_tokens(seed=2)
    alone = []
    for tokens, seed in ((a, 5), (b, 6)):
        with replay(plain, other_trace([11] * 3, seed), token_ids=tokens.tolist()):
            loss_of(plain, tokens).backward()
        alone.append(gradients(plain))
    losses = forward(model, a, 5), forward(model, b, 6)
    live = loss_of(model, a)
    for index in (1, 0):
        losses[index].backward()
        for name, gradient in gradients(model).items():
            assert_close(gradient, alone[index][name], 1e-5, name)
    live.backward()
    assert not any("forward" in vars(module) for module in model.modules())
    pickle.dumps(model.model.layers[0].mlp.gate)


def test_in_one_backward_each_forward_has_its_own(checkpointed):
    model, plain = checkpointed
    a, b = make_tokens(seed=1), make_tokens(seed=2)
    (forward(plain, a, 5) + 2 * forward(plain, b, 6)).backward()
    expected = gradients(plain)
    (forward(model, a, 5) + 2 * forward(model, b, 6)).backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], 1e-5, name)


def test_two_models_one_in_the_other(checkpointed):
    model, plain = checkpointed
    critic = make_model("mixtral").train()
    checkpoint_activations(critic, use_reentrant=False)
    tokens, results = make_tokens(), []
    for policy in (plain, model):
        with replay(policy, other_trace([11] * 3, 5), token_ids=tokens.tolist()):
            first = loss_of(policy, tokens)
            with replay(critic, other_trace([11] * 3, 6, (0, 1, 2)), token_ids=tokens.tolist()):
                second = loss_of(critic, tokens)
        (first + second).backward()
        results.append((gradients(policy), gradients(critic)))
    for got, expected in zip(results[1], results[0], strict=True):
        for name, gradient in got.items():
            assert_close(gradient, expected[name], 1e-5, name)


def test_what_hides_the_forward_is_an_error_and_leaves_nothing_behind():
    model, tokens = make_model("qwen3_moe").train(), make_tokens()
    checkpoint_activations(model, use_reentrant=False)
    with replay(model, other_trace([11] * 3), token_ids=tokens.tolist()):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model, tokens)
        with pytest.raises(InputError, match="does not say for which forward"):
            loss.backward()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_backward_that_failed_leaves_no_router_replaced():
    model, tokens = make_model("qwen3_moe").train(), make_tokens()
    checkpoint_activations(model, use_reentrant=False)
    loss = forward(model, tokens, 5)
    handle = model.model.layers[0].mlp.gate.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    expected = loss_of(copy.deepcopy(make_model("qwen3_moe")), tokens)
    assert_close(loss_of(model, tokens).detach(), expected.detach(), 1e-6)  # live again
    assert not any("forward" in vars(module) for module in model.modules())


# ------------------------------------------------------------------------------------------------ shifts
def recorded(model, tokens):
    with torch.no_grad(), record_routing(model) as record:
        model(tokens, use_cache=False)
    return record.trace(tokens.tolist())


def shifted(trace, tokens=0, layers=0):
    ids = np.roll(np.roll(trace.expert_ids, tokens, 0), layers, 1)
    return RoutingTrace(ids, trace.offsets, trace.num_experts, trace.moe_layer_ids)


def test_a_shift_is_noticed(caplog):
    model, tokens = make_model("mixtral").eval(), make_tokens(4, 15)
    trace = recorded(model, tokens)
    with replay(model, trace) as aligned:
        model(tokens, use_cache=False)
    assert aligned.share == 1.0
    stranger = make_model("mixtral").eval()
    with torch.no_grad():
        for layer in moe_layers(stranger):
            layer.router.weight.neg_()
    other = recorded(stranger, tokens)
    wrong = {"a token": shifted(trace, tokens=1), "a layer": shifted(trace, layers=1), "another model": other}
    for name, record in wrong.items():
        with pytest.raises(InputError, match=r"agrees .* on \d+% of the top-k sets"), replay(model, record):
            model(tokens, use_cache=False)
        caplog.clear()
        ids = tokens.tolist()  # which are checked: only what is shifted for certain is refused
        with (
            nullcontext() if record is other else pytest.raises(InputError, match=f"it is one {name[2:]} late"),
            replay(model, record, token_ids=ids) as alignment,
        ):
            model(tokens, use_cache=False)
        assert alignment.share < 0.5 and ("of an older policy" in caplog.text) is (record is other)
        caplog.clear()
        with replay(model, record, on_shift="warn") as alignment:
            model(tokens, use_cache=False)
        assert alignment.share < 0.5 and "of the top-k sets in the first MoE layers" in caplog.text
        caplog.clear()
        with replay(model, record, on_shift="ignore") as ignored:
            model(tokens, use_cache=False)
        assert ignored.share is None and not caplog.text
    ids = trace.expert_ids.copy()
    ids[::5] = shifted(trace, tokens=1).expert_ids[::5]  # a fifth of another policy
    with caplog.at_level(logging.WARNING), replay(model, RoutingTrace(ids, trace.offsets, E, LAYERS_3)) as partly:
        model(tokens, use_cache=False)
    assert 0.5 < partly.share < 0.9 and "older policy" in caplog.text
    with pytest.raises(InputError, match="on_shift is 'never'"), replay(model, trace, on_shift="never"):
        pass


LAYERS_3 = (0, 1, 2)


# ------------------------------------------------------------------------------------------------ layouts
