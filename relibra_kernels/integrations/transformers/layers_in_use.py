"""`layers(model)`: which MoE layers of a model our kernels compute, and why the others are not ours."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...nn import ReplicatedExperts
from ...planner.errors import InputError
from .experts import expert_form
from .moe_layers import MoeLayer, moe_layers

OURS = "relibra"


@dataclass(frozen=True)
class LayerInUse:
    """One MoE layer of a model.

    name: of its experts in the model. layer_id: of the decoder layer that it is in.
    num_experts, top_k: what its router chooses from, and how many a token gets.
    computed_by: "relibra", or the experts implementation of transformers that computes them ("grouped_mm", "eager").
    why_not: what keeps our kernels from computing them; empty where they can.
    """

    name: str
    layer_id: int
    num_experts: int
    top_k: int
    computed_by: str
    why_not: str = ""

    @property
    def is_ours(self) -> bool:
        return self.computed_by == OURS


def layers(model: nn.Module) -> list[LayerInUse]:
    """The MoE layers of a model in order, each with who computes its experts now.

    Raises: InputError where the model has none: it is dense, or another library has replaced its experts.
    """
    return [_in_use(layer) for layer in moe_layers(model)]


def _in_use(layer: MoeLayer) -> LayerInUse:
    computed_by, why_not = OURS, ""
    if not isinstance(layer.experts, ReplicatedExperts):
        config: Any = layer.experts.config
        computed_by = str(config._experts_implementation)  # what transformers looks up in every forward
        try:
            expert_form(layer.experts)
        except InputError as error:
            why_not = str(error)
    return LayerInUse(layer.name, layer.layer_id, layer.num_experts, layer.top_k, computed_by, why_not)
