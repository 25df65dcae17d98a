"""The MoE layers that shipped configs are for, and what a launch's sizes are in terms of a layer's."""

from dataclasses import dataclass

from ..form import GPT_OSS, ExpertForm
from ..planner.errors import InputError


@dataclass(frozen=True)
class Model:
    """One MoE layer, with the sizes of the model's published configuration."""

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


def model_named(name: str) -> Model:
    for model in MODELS:
        if model.name.lower() == name.lower():
            return model
    raise InputError(f"model is {name!r}; it must be one of {', '.join(map(str, MODELS))}, or give --shape")


def model_of_shape(text: str, form: ExpertForm) -> Model:
    """`H,I,E,K` as a model without a name of its own."""
    try:
        hidden_size, intermediate_size, num_experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"shape is {text!r}; it must be H,I,E,K: four integers with commas between them") from None
    if min(hidden_size, intermediate_size, num_experts, top_k) < 1 or top_k > num_experts:
        raise InputError(f"shape is {text!r}; H, I, E and K must be positive, and K at most E")
    return Model(text, hidden_size, intermediate_size, num_experts, top_k, form)
