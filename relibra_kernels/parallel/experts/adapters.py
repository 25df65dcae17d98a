"""Low-rank adapters of experts, as PEFT keeps them: `W[e] + scaling * B[e] @ A[e]`, over stacked parameters.

A is `[E * r, in]`, expert by expert; B is `[out, r * E]`, with the experts last. Both are seen here by expert,
`[E, r, in]` and `[E, out, r]`, so that they are cut, moved and saved as any other parameter of an expert is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...nn import ReplicatedExperts, ReplicatedMoE
from ...weights import ExpertWeights

_ATTRIBUTES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Factor:
    """A or B of one adapter of one stacked parameter.

    name: among those of a layer. linear: whose `weight` it is. wrapper: PEFT's, around the experts.
    """

    name: str
    linear: nn.Linear
    is_first: bool  # A
    wrapper: Any

    def by_expert(self, tensor: Tensor) -> Tensor:
        """A view `[E, ...]` of a tensor of the parameter's shape."""
        experts = self.wrapper.num_experts
        if self.is_first:
            return tensor.view(experts, -1, tensor.shape[1])
        return tensor.view(tensor.shape[0], -1, experts).permute(2, 0, 1)

    def whole(self, by_expert: Tensor) -> Tensor:
        """The other way round, for any number of experts."""
        return by_expert.flatten(0, 1) if self.is_first else by_expert.permute(1, 2, 0).flatten(1)


def find_adapters(model: nn.Module, layers: Sequence[ReplicatedMoE]) -> None:
    """Tell the experts of every layer which factors they have, in a fixed order: PEFT may have come at any time."""
    for moe in layers:
        moe.experts.adapters = []
    for module in model.modules():
        wrapper: Any = module
        if "lora_A" not in module._modules or not hasattr(module, "parameter_name"):
            continue
        experts = wrapper.get_base_layer()
        if isinstance(experts, ReplicatedExperts):
            for factor in ("lora_A", "lora_B"):
                for adapter, linear in getattr(wrapper, factor).items():
                    name = f"{wrapper.parameter_name}.{factor}.{adapter}"
                    experts.adapters.append(Factor(name, linear, factor == "lora_A", wrapper))


def kept_rows(tensor: Tensor, kept: Sequence[int], home_slots: int) -> Tensor:
    """A copy of some rows, [home_slots, ...]. A slot beyond them is zeros."""
    local = tensor.new_zeros((home_slots, *tensor.shape[1:]))
    local[: len(kept)] = tensor[list(kept)]
    return local


def keep_adapted(experts: ReplicatedExperts, kept: Sequence[int], home_slots: int) -> None:
    """Replace each factor of all experts by one of the kept ones, of `home_slots` experts."""
    for factor in experts.adapters:
        weight = factor.linear.weight
        local = factor.whole(kept_rows(factor.by_expert(weight.detach()), kept, home_slots)).contiguous()
        factor.linear.weight = nn.Parameter(local, requires_grad=weight.requires_grad)
        factor.linear.out_features, factor.linear.in_features = local.shape
    for wrapper in {id(factor.wrapper): factor.wrapper for factor in experts.adapters}.values():
        wrapper.num_experts = home_slots


@torch.no_grad()
def effective_weights(experts: ReplicatedExperts) -> ExpertWeights:
    """What the experts compute with: the parameters, and what adapters add to them where they are not added yet."""
    weights = experts.weights
    if not experts.adapters:
        return weights
    added = dict.fromkeys(_ATTRIBUTES, 0)
    for attribute in _ATTRIBUTES:
        if not parametrize.is_parametrized(experts, attribute):
            added[attribute] = sum(wrapper.get_delta_weight(name) for wrapper, name in _active(experts, attribute))
    return weights._replace(gate_up=weights.gate_up + added["gate_up_proj"], down=weights.down + added["down_proj"])


def _active(experts: ReplicatedExperts, attribute: str) -> list[tuple[Any, str]]:
    """(wrapper, adapter) of what is added to a parameter in a forward."""
    found = []
    for wrapper in {id(factor.wrapper): factor.wrapper for factor in experts.adapters}.values():
        if wrapper.parameter_name == attribute and not wrapper.disable_adapters and not wrapper.merged:
            found += [(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
    return found


class LateGradients:
    """Gradients of effective weights that arrive after the backwards of a batch, and go on to the factors."""

    def __init__(self) -> None:
        self._arrived: list[tuple[ReplicatedExperts, str, Tensor]] = []

    def buffers(self, experts: ReplicatedExperts, own: ExpertWeights) -> ExpertWeights:
        """Buffers to add gradients `[E/R, ...]` to: the parameters' own, and new ones for adapted parameters."""
        if not experts.adapters:
            return own
        found = []
        for attribute, buffer in zip(_ATTRIBUTES, own[:2], strict=True):
            if _active(experts, attribute):
                buffer = torch.zeros_like(getattr(experts, attribute), dtype=torch.float32)
                self._arrived.append((experts, attribute, buffer))
            found.append(buffer)
        return own._replace(gate_up=found[0], down=found[1])

    def finish(self) -> None:
        for experts, attribute, buffer in self._arrived:
            for wrapper, name in _active(experts, attribute):
                with torch.enable_grad():
                    wrapper.get_delta_weight(name).backward(buffer.to(getattr(experts, attribute).dtype))
                parameter = getattr(experts, attribute)
                if parameter.requires_grad:
                    parameter.grad = buffer.to(parameter.dtype) + (0 if parameter.grad is None else parameter.grad)
        self._arrived.clear()
