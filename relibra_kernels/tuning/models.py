"""The MoE layers that shipped configs are for, and what a launch's sizes are in terms of a layer's."""

from dataclasses import dataclass

from ..form import GPT_OSS, ExpertForm
from ..planner.errors import InputError
from ..planner.pricing.models import MODELS as SHAPES
from ..planner.pricing.models import ModelShape, shape_of_text


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


def _of_shape(shape: ModelShape, form: ExpertForm) -> Model:
    return Model(shape.name, shape.hidden_size, shape.intermediate_size, shape.experts, shape.top_k, form)


_FORMS = {"gpt-oss-120b": GPT_OSS}
MODELS = [_of_shape(shape, _FORMS.get(shape.name, ExpertForm())) for shape in SHAPES.values()]


def model_named(name: str) -> Model:
    for model in MODELS:
        if model.name.lower() == name.lower():
            return model
    raise InputError(f"model is {name!r}; it must be one of {', '.join(map(str, MODELS))}, or give --shape")


def model_of_shape(text: str, form: ExpertForm) -> Model:
    """`H,I,E,K` as a model without a name of its own."""
    return _of_shape(shape_of_text(text), form)
