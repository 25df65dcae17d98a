"""Other implementations of the same experts, over the same parameters: `f(experts, x, indices, weights) -> out`."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from relibra_kernels.nn import ReplicatedExperts

Implementation = Callable[[ReplicatedExperts, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def relibra(experts, x, indices, weights):
    return experts(x, indices, weights)


def _gate(experts, h):
    """The activation through autograd."""
    form = experts.form
    gate, up = h.chunk(2, -1) if form.is_concatenated else (h[..., 0::2], h[..., 1::2])
    if form.activation == "silu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return gate * torch.sigmoid(form.alpha * gate) * (up + 1)


def loop_of_matmuls(experts, x, indices, weights):
    """One expert after the other with plain matmuls: what a user writes by hand."""
    out, form = torch.zeros_like(x), experts.form
    for e in range(experts.num_experts):
        token, k = torch.where(indices == e)
        if not len(token):
            continue
        gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
        gate_up, down = (gate_up, down) if form.is_transposed else (gate_up.t(), down.t())
        h = x[token] @ gate_up
        y = _gate(experts, h + experts.gate_up_proj_bias[e] if form.has_bias else h) @ down
        y = y + experts.down_proj_bias[e] if form.has_bias else y
        out = out.index_add(0, token, y * weights[token, k, None])
    return out


def grouped_mm(experts, x, indices, weights):
    """torch.nn.functional.grouped_mm around a sort, as transformers' implementation of that name does it."""
    tokens, top_k = indices.shape
    form = experts.form
    expert, order = indices.flatten().sort(stable=True)
    offsets = torch.bincount(expert, minlength=experts.num_experts).cumsum(0).int()
    gate_up, down = experts.gate_up_proj, experts.down_proj
    gate_up, down = (gate_up, down) if form.is_transposed else (gate_up.mT, down.mT)
    h = F.grouped_mm(x[order // top_k], gate_up, offs=offsets)
    h = h + experts.gate_up_proj_bias[expert] if form.has_bias else h
    y = F.grouped_mm(_gate(experts, h), down, offs=offsets)
    y = y + experts.down_proj_bias[expert] if form.has_bias else y
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return ((y * weights.flatten()[order, None])[back]).view(tokens, top_k, -1).sum(1)


def transformers(implementation: str) -> Implementation:
    """transformers' Qwen3-MoE experts with one of its built-in implementations."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def run(experts, x, indices, weights):
        config = Qwen3MoeConfig(num_experts=1, hidden_size=1, moe_intermediate_size=1)
        config._experts_implementation = implementation
        theirs = Qwen3MoeExperts(config)
        theirs.num_experts = experts.num_experts
        theirs.gate_up_proj, theirs.down_proj = experts.gate_up_proj, experts.down_proj
        return theirs(x, indices, weights)

    run.__name__ = f"transformers {implementation}"
    return run


def implementations(form_is_qwen: bool) -> dict[str, Implementation]:
    """Every peer that is installed, ours first."""
    found: dict[str, Implementation] = {"relibra": relibra, "loop": loop_of_matmuls, "grouped_mm": grouped_mm}
    if form_is_qwen and importlib.util.find_spec("transformers"):
        found |= {f"transformers {name}": transformers(name) for name in ("eager", "grouped_mm")}
        if importlib.util.find_spec("sonicmoe") and torch.cuda.is_available():
            found["sonic-moe"] = transformers("sonicmoe")
    if form_is_qwen and importlib.util.find_spec("scattermoe") and torch.cuda.is_available():
        found["scattermoe"] = scattermoe
    if form_is_qwen and importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        found["liger"] = liger
    return found


def liger(experts, x, indices, weights):
    """Liger's fused MoE, https://github.com/linkedin/Liger-Kernel."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, experts.gate_up_proj, experts.down_proj, indices.int(), weights)


def scattermoe(experts, x, indices, weights):
    """scattermoe's parallel experts, https://github.com/shawntan/scattermoe."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    sorted_expert, sorted_scattered, offsets = flatten_sort_count(indices, num_experts=experts.num_experts)
    top_k = indices.shape[1]
    h = parallel_linear(x, experts.gate_up_proj.mT, top_k, sorted_expert, sorted_scattered, offsets, grouped_out=True)
    return parallel_linear(
        _gate(experts, h), experts.down_proj.mT, 1, sorted_expert, sorted_scattered, offsets,
        grouped_in=True, gates=weights,
    )  # fmt: skip
