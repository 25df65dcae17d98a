"""Record and replay through what models are wrapped in: PEFT, DDP, FSDP, checkpointing, torch.compile."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import loss_of, make_model, make_tokens, other_trace
from ranks import one_rank
from tolerance import assert_close

from relibra_kernels.integrations.transformers import record_routing, replay
from relibra_kernels.integrations.transformers.moe_layers import moe_layers

LAYERS = (0, 2)


class Passing(nn.Module):
    """Like the wrappers of PEFT, DDP, FSDP and checkpointing: it calls what it wraps and passes its attributes on."""

    def __init__(self, inner, name):
        super().__init__()
        self._inner_name = name
        setattr(self, name, inner)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.__dict__["_inner_name"]), name)

    def forward(self, *args, **kwargs):
        return self._modules[self._inner_name](*args, **kwargs)


def wrapped(kind):
    model = make_model("qwen3_moe").eval()
    match kind:
        case "experts twice":
            for layer in LAYERS:
                mlp = model.model.layers[layer].mlp
                mlp.experts = Passing(Passing(mlp.experts, "base_layer"), "base_layer")
        case "blocks and routers":
            for layer in LAYERS:
                mlp = model.model.layers[layer].mlp
                mlp.gate = Passing(mlp.gate, "_checkpoint_wrapped_module")
                model.model.layers[layer] = Passing(model.model.layers[layer], "_fsdp_wrapped_module")
        case "whole":
            model = Passing(Passing(model, "_fsdp_wrapped_module"), "module")
        case "compiled":
            model = torch.compile(model, backend="eager")
        case "compiled in place":
            model.compile(backend="eager")
    return model


@pytest.mark.parametrize("kind", ["experts twice", "blocks and routers", "whole", "compiled", "compiled in place"])
def test_wrappers_of_every_kind(kind):
    model, tokens, trace = wrapped(kind), make_tokens(), other_trace([11] * 3)
    if kind.startswith("compiled"):
        model(tokens, use_cache=False)  # what was compiled before must not be what runs
    assert [layer.layer_id for layer in moe_layers(model)] == list(LAYERS)
    with torch.no_grad(), record_routing(model) as record, replay(model, trace, token_ids=tokens.tolist()):
        model(tokens, use_cache=False)
        model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    found = record.trace()
    assert np.diff(found.offsets).tolist() == [11] * 3 + [14] * 3
    np.testing.assert_array_equal(found.select(range(3)).expert_ids, trace.expert_ids)
    for sequence in range(3):
        np.testing.assert_array_equal(found.sequence(3 + sequence)[:11], trace.sequence(sequence))


def really_wrapped(kind, model):
    """By what trainers wrap models in; in a process group of one rank."""
    layers = model.model.layers
    match kind:
        case "DDP":
            return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        case "FSDP":
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        case "FSDP2":
            mesh = init_device_mesh("cpu", (1,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        case "checkpointing":
            of_kind = type(layers[0])
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, of_kind))
        case "compiled DDP":
            return torch.compile(really_wrapped("DDP", model), backend="eager")
    return model


@pytest.fixture(scope="module")
def alone():
    with one_rank():
        yield


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP", "FSDP2", "checkpointing", "compiled DDP"])
def test_real_wrappers_record_and_replay(kind, family, alone):
    tokens = make_tokens(3, 7)

    def step(kind):
        model = make_model(family).train()
        trace = other_trace([7] * 3, 4, tuple(layer.layer_id for layer in moe_layers(model)))
        model = really_wrapped(kind, model)
        with replay(model, trace, token_ids=tokens.tolist()), record_routing(model) as record:
            loss = loss_of(model, tokens)
        np.testing.assert_array_equal(record.trace(tokens.tolist()).expert_ids, trace.expert_ids)
        loss.backward()  # after the block
        whole = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters() if p.grad is not None]
        return loss.detach(), torch.cat([gradient.flatten() for gradient in whole])

    (loss, gradient), (expected_loss, expected) = step(kind), step("none")
    assert_close(loss, expected_loss, 1e-6)
    if kind == "FSDP":  # its flat parameters are in another order
        gradient, expected = gradient.sort().values, expected.sort().values
    assert_close(gradient, expected, 1e-5)
