"""Other implementations of the same experts, over the same parameters.

`PEERS[name](experts)` builds one for a layer, once; it is then called as `run(x, indices, weights) -> out`. Building
one that is not installed, or that computes no experts of this form, raises ImportError or Unsuitable.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from relibra_kernels.nn import ReplicatedExperts

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Build = Callable[[ReplicatedExperts], Run]


class Unsuitable(Exception):  # noqa: N818 (nothing is wrong)
    """This peer does not compute experts of this form, or not on this device."""


def relibra(experts: ReplicatedExperts) -> Run:
    return experts


def _gate(form: Any, h: torch.Tensor) -> torch.Tensor:
    """The activation through autograd."""
    gate, up = h.chunk(2, -1) if form.is_concatenated else (h[..., 0::2], h[..., 1::2])
    if form.activation == "silu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return gate * torch.sigmoid(form.alpha * gate) * (up + 1)


def loop_of_matmuls(experts: ReplicatedExperts) -> Run:
    """One expert after the other with plain matmuls: what a user writes by hand."""
    form = experts.form
    layer: Any = experts  # biases are there where the form has them

    def run(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in range(experts.num_experts):
            token, k = torch.where(indices == e)
            if not len(token):
                continue
            gate_up, down = layer.gate_up_proj[e], layer.down_proj[e]
            gate_up, down = (gate_up, down) if form.is_transposed else (gate_up.t(), down.t())
            h = x[token] @ gate_up
            y = _gate(form, h + layer.gate_up_proj_bias[e] if form.has_bias else h) @ down
            y = y + layer.down_proj_bias[e] if form.has_bias else y
            out = out.index_add(0, token, y * weights[token, k, None])
        return out

    return run


def grouped_mm(experts: ReplicatedExperts) -> Run:
    """torch.nn.functional.grouped_mm around a sort, as transformers' implementation of that name does it."""
    form = experts.form
    if not hasattr(F, "grouped_mm"):
        raise Unsuitable(f"torch {torch.__version__} has no grouped_mm")
    layer: Any = experts

    def run(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, top_k = indices.shape
        expert, order = indices.flatten().sort(stable=True)
        # how often each occurs, without bincount, which waits for the device
        offsets = torch.searchsorted(expert, torch.arange(experts.num_experts, device=x.device), right=True).int()
        gate_up, down = layer.gate_up_proj, layer.down_proj
        gate_up, down = (gate_up, down) if form.is_transposed else (gate_up.mT, down.mT)
        h = F.grouped_mm(x[order // top_k], gate_up, offs=offsets)
        h = h + layer.gate_up_proj_bias[expert] if form.has_bias else h
        y = F.grouped_mm(_gate(form, h), down, offs=offsets)
        y = y + layer.down_proj_bias[expert] if form.has_bias else y
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return ((y * weights.flatten()[order, None])[back]).view(tokens, top_k, -1).sum(1)

    return run


def transformers(implementation: str) -> Build:
    """transformers' Qwen3-MoE experts with one of its built-in implementations."""

    def build(experts: ReplicatedExperts) -> Run:
        _needs_plain(experts)
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(num_experts=1, hidden_size=1, moe_intermediate_size=1)
        config._experts_implementation = implementation
        theirs: Any = Qwen3MoeExperts(config)
        theirs.num_experts = experts.num_experts
        theirs.gate_up_proj, theirs.down_proj = experts.gate_up_proj, experts.down_proj
        return theirs

    return build


def sonicmoe(experts: ReplicatedExperts) -> Run:
    """sonic-moe through transformers, https://github.com/Dao-AILab/sonic-moe."""
    importlib.import_module("sonicmoe")
    _needs_gpu(experts)
    return transformers("sonicmoe")(experts)


def liger(experts: ReplicatedExperts) -> Run:
    """Liger's fused MoE, https://github.com/linkedin/Liger-Kernel."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    _needs_plain(experts)
    _needs_gpu(experts)

    def run(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return LigerFusedMoEFunction.apply(x, experts.gate_up_proj, experts.down_proj, indices.int(), weights)

    return run


def scattermoe(experts: ReplicatedExperts) -> Run:
    """scattermoe's parallel experts, https://github.com/shawntan/scattermoe."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    _needs_plain(experts)
    _needs_gpu(experts)

    def run(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        expert, scattered, offsets = flatten_sort_count(indices, num_experts=experts.num_experts)
        h = parallel_linear(x, experts.gate_up_proj.mT, indices.shape[1], expert, scattered, offsets, grouped_out=True)
        return parallel_linear(
            _gate(experts.form, h), experts.down_proj.mT, 1, expert, scattered, offsets, grouped_in=True, gates=weights
        )

    return run


def _needs_plain(experts: ReplicatedExperts) -> None:
    form = experts.form
    if form.activation != "silu" or form.has_bias or form.is_transposed or not form.is_concatenated:
        raise Unsuitable(f"it computes plain SwiGLU experts, not {form}")


def _needs_gpu(experts: ReplicatedExperts) -> None:
    if not experts.gate_up_proj.is_cuda:
        raise Unsuitable("it needs a GPU")


PEERS: dict[str, Build] = {
    "grouped_mm": grouped_mm,
    "loop": loop_of_matmuls,
    "transformers grouped_mm": transformers("grouped_mm"),
    "transformers eager": transformers("eager"),
    "liger": liger,
    "scattermoe": scattermoe,
    "sonic-moe": sonicmoe,
}


def implementations(experts: ReplicatedExperts) -> dict[str, Run]:
    """Ours first, then every peer that is installed and computes this layer."""
    found: dict[str, Run] = {"relibra": relibra(experts)}
    for name, build in PEERS.items():
        try:
            found[name] = build(experts)
        except (ImportError, Unsuitable):
            continue
    return found
