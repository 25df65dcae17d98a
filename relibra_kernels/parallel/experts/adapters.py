"""Low-rank adapters of experts, as PEFT keeps them: `W[e] + scaling * B[e] @ A[e]`, over stacked parameters.

A is `[E * r, in]`, expert by expert; B is `[out, r * E]`, with the experts last. Both are seen here by expert,
`[E, r, in]` and `[E, out, r]`, so that they are cut, moved and saved as any other parameter of an expert is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import ReplicatedExperts


@dataclass(frozen=True)
class Adapter:
    """One low-rank factor of one stacked parameter.

    name: among those of a layer. owner: the module whose `weight` it is.
    """

    name: str
    owner: nn.Linear
    is_first: bool  # A
    experts: int

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner.weight

    def by_expert(self, tensor: Tensor) -> Tensor:
        """A view `[E, ...]` of a tensor of the parameter's shape."""
        if self.is_first:
            return tensor.view(self.experts, -1, tensor.shape[1])
        return tensor.view(tensor.shape[0], -1, self.experts).permute(2, 0, 1)

    def whole(self, by_expert: Tensor) -> Tensor:
        """The other way round, for any number of experts."""
        if self.is_first:
            return by_expert.flatten(0, 1)
        return by_expert.permute(1, 2, 0).flatten(1)


def adapted(model: nn.Module) -> Iterator[tuple[ReplicatedExperts, Any]]:
    """(experts, wrapper) of every parameter of experts that has adapters."""
    for module in model.modules():
        wrapper: Any = module
        if not {"lora_A", "lora_B"} <= module._modules.keys() or not hasattr(module, "parameter_name"):
            continue
        inner = wrapper.get_base_layer()
        if isinstance(inner, ReplicatedExperts):
            yield inner, wrapper


def adapters_of(model: nn.Module) -> dict[int, list[Adapter]]:
    """The adapters of every layer's experts, by the id of the experts, in a fixed order."""
    found: dict[int, list[Adapter]] = {}
    for experts, wrapper in adapted(model):
        for factor in ("lora_A", "lora_B"):
            for adapter, linear in getattr(wrapper, factor).items():
                name = f"{wrapper.parameter_name}.{factor}.{adapter}"
                one = Adapter(name, linear, factor == "lora_A", wrapper.num_experts)
                found.setdefault(id(experts), []).append(one)
    return found
