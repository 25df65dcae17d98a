"""The MoE layers that shipped configs are for, and what a launch's sizes are in terms of a layer's."""

from dataclasses import dataclass

from ..form import GPT_OSS, ExpertForm
from ..planner.errors import InputError
from ..planner.pricing.models import MODELS as SHAPES
from ..planner.pricing.models import ModelShape, find_model


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
        """FLOPs of forward and backward: three products a weight, two FLOPs a multiply-add."""
        return 3 * 2 * tokens * self.top_k * 3 * self.hidden_size * self.intermediate_size


def _of_shape(shape: ModelShape, form: ExpertForm) -> Model:
    return Model(shape.name, shape.hidden_size, shape.intermediate_size, shape.experts, shape.top_k, form)


_FORMS = {"gpt-oss-120b": GPT_OSS, "gpt-oss-20b": GPT_OSS}
# Those that shipped configs are made for; siblings of the same sizes use the same ones.
_SHIPPED = (
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
    "GLM-4.5-Air",
    "DeepSeek-V3",
    "Moonlight-16B-A3B",
    "OLMoE",
    "Mixtral-8x7B",
    "gpt-oss-120b",
    "Kimi-K2",
)
MODELS = [_of_shape(SHAPES[name], _FORMS.get(name, ExpertForm())) for name in _SHIPPED]


def model_named(text: str, form: ExpertForm | None = None) -> Model:
    """The layer of a model in any form that `find_model` takes; `form` is that of its weights, where it is known.

    Raises: InputError for experts without a gate, which are neither tuned nor timed.
    """
    shape = find_model(text)
    if not shape.has_gate:
        raise InputError(f"model is {text!r}, whose experts have no gate; only experts with one are tuned and timed")
    return _of_shape(shape, form or _FORMS.get(shape.name, ExpertForm()))
