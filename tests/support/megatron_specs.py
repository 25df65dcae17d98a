"""Specs of megatron-core, local and of Transformer Engine, with our layer in them; stand-ins for what needs a GPU."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron_ranks import example, trainer_that_moves
from torch import nn

MOE: dict[str, Any] = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}


def engine_spec(**options: Any) -> Any:
    """Made without Transformer Engine too, once its module of specs knows the class that it forgets then."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    provider.is_te_min_version = lambda *_, **__: True
    gpt_layer_specs.TESpecProvider = provider.TESpecProvider
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=8, **options)


def moe_of(spec: Any) -> tuple[Any, Any]:
    """(class of the MoE layer of a layer's spec, its submodules); 0.16 has a `ModuleSpec`, 0.19 a partial."""
    mlp = spec.submodules.mlp
    if isinstance(mlp, functools.partial):
        return mlp.func, mlp.keywords["submodules"]
    return mlp.module, mlp.submodules


class NormThenLinear(nn.Module):
    """In the place of Transformer Engine's fused norm and linear layer."""

    def __init__(self, input_size, output_size, *, config, **options):
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        super().__init__()
        self.norm = nn.LayerNorm(input_size, config.layernorm_epsilon)
        self.linear = ColumnParallelLinear(input_size, output_size, config=config, **options)

    def forward(self, hidden):
        return self.linear(self.norm(hidden))


def on_cpu(spec: Any) -> Any:
    """A spec of Transformer Engine whose modules are stand-ins; where they are is as it has them."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    attention = spec.submodules.self_attention.submodules
    assert attention.linear_qkv is te.TELayerNormColumnParallelLinear
    assert attention.linear_proj is te.TERowParallelLinear
    attention.linear_qkv, attention.linear_proj = NormThenLinear, RowParallelLinear
    attention.core_attention = DotProductAttention
    assert "TENorm" in str(spec.submodules.pre_mlp_layernorm)  # 0.19 has one that adds the residual, for its own use
    spec.submodules.pre_mlp_layernorm = WrappedTorchNorm
    return spec


def losses(of_engine: bool, steps: int) -> list[float]:
    """Under plans; two layers with a shared expert, whose linear layers the spec names too."""
    options = {**MOE, "moe_shared_expert_intermediate_size": 16}
    if of_engine:
        options["layer_spec"] = on_cpu(engine_spec())
        moe_of(options["layer_spec"])[1].shared_experts = moe_of(example().local_spec())[1].shared_experts
    trainer = trainer_that_moves(options)
    return [trainer.step(step) for step in range(steps)]


def with_groups_of_its_own() -> tuple[int, int]:
    """(expert parallel sizes of the layers, of `parallel_state`): a model made with a collection of its own."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    module, state = example(), example().parallel_state
    groups = ProcessGroupCollection.use_mpu_process_groups()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups.ep, groups.expt_dp = alone, dist.group.WORLD
    torch.manual_seed(1)
    spec = module.with_relibra_experts(module.local_spec(), groups=groups)
    model = module.GPTModel(
        module.config_of(**MOE, expert_model_parallel_size=1),
        spec,
        module.VOCABULARY,
        module.LENGTH,
        pg_collection=groups,
    )
    sizes = {layer.mlp.ep_group.size() for layer in model.decoder.layers}
    ep = module.expert_parallel(model, gpus_per_node=1, groups=groups)
    assert ep.comm.size == 1 and ep.groups.copies is not None
    return sizes.pop(), state.get_expert_model_parallel_world_size()
