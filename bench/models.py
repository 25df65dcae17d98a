"""The MoE layers that are measured: sizes from the models' published configurations."""

from dataclasses import dataclass

import torch

from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.nn import ReplicatedExperts


@dataclass(frozen=True)
class Model:
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    form: ExpertForm = ExpertForm()  # noqa: RUF009 (frozen)

    def __str__(self) -> str:
        return self.name

    def flops(self, tokens: int) -> int:
        """Of forward and backward: three products a weight, two FLOPs a multiply-add."""
        return 3 * 2 * tokens * self.top_k * 3 * self.hidden_size * self.intermediate_size


MODELS = [
    Model("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Model("Qwen3-235B-A22B", 4096, 1536, 128, 8),
    Model("GLM-4.5-Air", 4096, 1408, 128, 8),
    Model("DeepSeek-V3", 7168, 2048, 256, 8),
    Model("Moonlight-16B-A3B", 2048, 1408, 64, 6),
    Model("OLMoE", 2048, 1024, 64, 8),
    Model("Mixtral-8x7B", 4096, 14336, 8, 2),
    Model("gpt-oss-120b", 2880, 2880, 128, 4, GPT_OSS),
    Model("Kimi-K2", 7168, 2048, 384, 8),
]


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
