"""The layers that are measured: one rank's share of a model's experts, with inputs and routing."""

from dataclasses import dataclass

import torch

from relibra_kernels.nn import ReplicatedExperts
from relibra_kernels.tuning.models import MODELS, Model

__all__ = ["MODELS", "Layer", "Model", "make_layer", "routing"]


def routing(tokens: int, num_experts: int, top_k: int, skew: float, seed: int = 0) -> torch.Tensor:
    """Distinct experts a token, log-normally popular; skew 1.1 gives 128 experts a max/mean of about 7."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.randn(num_experts, generator=generator) * skew
    gumbel = -torch.rand(tokens, num_experts, generator=generator).log().neg().log()
    return (popularity + gumbel).topk(top_k, dim=1).indices


@dataclass
class Layer:
    """One layer's experts and inputs."""

    experts: ReplicatedExperts
    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    dout: torch.Tensor

    def clear(self) -> None:
        for leaf in (self.x, self.weights, *self.experts.parameters()):
            leaf.grad = None


def make_layer(model: Model, tokens: int, skew: float, *, num_experts: int, dtype: torch.dtype, device: str) -> Layer:
    """`num_experts` of the model's experts, as one rank of an expert-parallel group holds them."""
    torch.manual_seed(0)
    experts = ReplicatedExperts(
        num_experts, model.hidden_size, model.intermediate_size, form=model.form, dtype=dtype, device=device
    )
    top_k = min(model.top_k, num_experts)
    x, dout = torch.randn(2, tokens, model.hidden_size, device=device).to(dtype)
    weights = torch.rand(tokens, top_k, device=device).softmax(-1).to(dtype)
    indices = routing(tokens, num_experts, top_k, skew).to(device)
    return Layer(experts, x.requires_grad_(), indices, weights.requires_grad_(), dout)
