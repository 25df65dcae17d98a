"""Swap whole MoE blocks for `ReplicatedMoE`: what `ExpertParallel` needs."""

from functools import cache
from typing import Any

from torch import nn

from ...nn import ReplicatedExperts, ReplicatedMoE, TopKRouter
from ...planner.errors import InputError


def replace_moe_blocks(model: nn.Module) -> list[ReplicatedMoE]:
    """Swap every Qwen3-MoE block of `model`, in place, for a `ReplicatedMoE` over the same parameters.

    Nothing is copied and the keys of the state dict stay. Returns the new blocks in layer order.
    Raises: InputError where the model has no such block.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    found = [(name, block) for name, block in model.named_modules() if isinstance(block, Qwen3MoeSparseMoeBlock)]
    if not found:
        raise InputError(
            f"model is a {type(model).__name__} without a Qwen3MoeSparseMoeBlock; there is none to replace"
        )
    replaced = []
    for name, block in found:
        moe = _replicated(block)
        moe.train(block.training)
        model.set_submodule(name, moe)
        replaced.append(moe)
    return replaced


@cache
def _router_class(theirs: Any) -> type[TopKRouter]:
    """Our router, which transformers takes for its own: it goes by the class to collect router logits."""
    return type("TopKRouter", (TopKRouter, theirs), {})


def _replicated(block: Any) -> ReplicatedMoE:
    gate, experts = block.gate, block.experts
    act = type(experts.act_fn).__name__
    if act not in ("SiLU", "SiLUActivation"):
        raise InputError(f"the experts' activation is {act}; it must be silu")
    router = _router_class(gate.__class__)(
        gate.hidden_dim, gate.num_experts, gate.top_k, normalize=gate.norm_topk_prob, device="meta"
    )
    router.weight = gate.weight
    router._forward_hooks.update(gate._forward_hooks)  # transformers installs its collectors once, at the first forward
    ours = ReplicatedExperts(experts.num_experts, experts.hidden_dim, experts.intermediate_dim, device="meta")
    ours.gate_up_proj, ours.down_proj = experts.gate_up_proj, experts.down_proj
    return ReplicatedMoE(router, ours)
