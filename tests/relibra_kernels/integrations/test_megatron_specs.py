"""megatron-core's specs with our layer in them, of 0.16 and 0.19, local and Transformer Engine's; what is refused."""

import copy
import functools
import importlib.util
import os
import types

import pytest
import torch

if importlib.util.find_spec("megatron") is None and os.environ.get("RELIBRA_MEGATRON") != "required":
    pytest.skip("megatron-core is not installed", allow_module_level=True)

import megatron_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from ranks import Ranks

from relibra_kernels.integrations.megatron_choice import expert_form
from relibra_kernels.integrations.megatron_layer import ReplicatedMoELayer
from relibra_kernels.integrations.megatron_moe import with_relibra_experts
from relibra_kernels.planner.errors import InputError


def specs():
    yield "local", get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
    yield "local, normalised queries", get_gpt_layer_local_spec(num_experts=8, qk_layernorm=True)
    yield "engine", megatron_specs.engine_spec()
    yield "engine, grouped GEMM", megatron_specs.engine_spec(moe_grouped_gemm=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "spec"), [pytest.param(*pair, id=pair[0]) for pair in specs()])
def test_only_the_moe_layer_of_a_spec_is_replaced(name, spec):
    before = copy.copy(spec.submodules)
    replaced = with_relibra_experts(spec)
    ours, theirs = megatron_specs.moe_of(replaced), megatron_specs.moe_of(spec)
    assert ours[0] is ReplicatedMoELayer and theirs[0] is MoELayer  # the given one stays as it was
    assert ours[1] is theirs[1] and ours[1].router is TopKRouter
    for field in vars(before):
        if field != "mlp":
            assert getattr(replaced.submodules, field) is getattr(before, field)


@pytest.mark.parametrize("form", ["0.16", "0.19"])
def test_both_forms_of_a_moe_layers_spec(form):
    """Whichever of them this megatron-core makes itself."""
    parts = MoESubmodules(experts=torch.nn.Identity)
    whole = {
        "0.16": ModuleSpec(MoELayer, params={"name": "x"}, submodules=parts),
        "0.19": functools.partial(MoELayer, submodules=parts, name="x"),
    }[form]
    layer = ModuleSpec(torch.nn.Module, submodules=types.SimpleNamespace(mlp=whole))
    block = types.SimpleNamespace(layer_specs=[layer, layer])
    replaced = with_relibra_experts(block)
    for one in replaced.layer_specs:
        mlp = one.submodules.mlp
        found = (mlp.module, mlp.params) if form == "0.16" else (mlp.func, {"name": mlp.keywords["name"]})
        assert found == (ReplicatedMoELayer, {"name": "x"}) and megatron_specs.moe_of(one)[1] is parts


def test_the_moe_layers_of_a_hybrid_stack_are_replaced():
    """Those of attention and of a state space stay."""
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules

    moe, attention = get_gpt_layer_local_spec(num_experts=8), get_gpt_layer_local_spec()
    parts = MambaStackSubmodules(mamba_layer=torch.nn.Identity, attention_layer=attention, moe_layer=moe)
    replaced = with_relibra_experts(ModuleSpec(MambaStack, submodules=parts)).submodules
    assert megatron_specs.moe_of(replaced.moe_layer)[0] is ReplicatedMoELayer
    assert megatron_specs.moe_of(parts.moe_layer)[0] is MoELayer
    assert (
        replaced.mamba_layer is torch.nn.Identity
        and replaced.attention_layer.submodules.mlp is attention.submodules.mlp
    )


def test_a_spec_without_moe_layers_is_refused():
    with pytest.raises(InputError, match="spec ModuleSpec has no MoE layer"):
        with_relibra_experts(get_gpt_layer_local_spec())


def config(**change):
    known = {
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "activation_func": torch.nn.functional.silu,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "moe_router_load_balancing_type": "aux_loss",
    }
    return types.SimpleNamespace(**{**known, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gated_linear_unit": False}, "gated_linear_unit is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"activation_func": torch.nn.functional.gelu}, "activation_func is .*gelu"),
        ({"moe_latent_size": 64}, "moe_latent_size is 64"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor is 1.0"),
        ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input is True"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size is 2"),
        ({"moe_router_fusion": True}, "moe_router_fusion is True"),
        ({"moe_shared_expert_overlap": True}, "moe_shared_expert_overlap is True"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm is True"),
        ({"delay_wgrad_compute": True}, "delay_wgrad_compute is True"),
        ({"fp8": "e4m3"}, "fp8 is 'e4m3'"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel is False, but must be True"),
        ({"cuda_graph_impl": "local"}, r"cuda_graph_impl is 'local' of \['full'\]"),
        ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn", "moe_router"]}, "'moe_router'"),
        ({"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe"]}, "'moe'"),
    ],
)
def test_configs_that_we_would_not_carry_out_are_refused(change, message):
    expert_form(config(tensor_model_parallel_size=2, sequence_parallel=True))
    expert_form(config(cuda_graph_impl="transformer_engine", cuda_graph_scope=["attn"]))
    with pytest.raises(InputError, match=message):
        expert_form(config(**change))


def test_a_spec_of_transformer_engine_trains_as_the_local_one():
    """With stand-ins for its modules, which need a GPU: norms and linear layers are where its spec has them."""
    ranks = Ranks(1, daemon=False)
    try:
        local, engine = (ranks.run(megatron_specs.losses, of_engine, 3)[0] for of_engine in (False, True))
        assert len(set(local)) == 3 and engine == pytest.approx(local, rel=1e-6)
    finally:
        ranks.close()


def test_a_model_with_a_group_collection_of_its_own():
    ranks = Ranks(2, daemon=False)
    try:
        assert ranks.run(megatron_specs.with_groups_of_its_own) == [(1, 2)] * 2
    finally:
        ranks.close()
