"""Low-rank adapters of experts, as PEFT keeps them: `W[e] + scaling * B[e] @ A[e]`, over stacked parameters.

A is `[E * r, in]`, expert by expert; B is `[out, r * E]`, with the experts last. Both are seen here by expert,
`[E, r, in]` and `[E, out, r]`, so that they are cut, moved and saved as any other parameter of an expert is.

A replica gets the factors beside the weights, and returns the factors' gradients alone where the weights are frozen.
What PEFT itself adds to the weights (several adapters at once, one expert a rank) is added here too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import ReplicatedExperts, ReplicatedMoE
from ...weights import ExpertWeights

_WEIGHTS = ("gate_up", "down")  # fields of ExpertWeights


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
        """The opposite of `by_expert`: a tensor of the parameter's shape, for any number of experts."""
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


def adapted_weights(experts: ReplicatedExperts) -> ExpertWeights:
    """What the experts compute with in a forward of the model, as `experts.weights` is there; differentiable."""
    weights = experts.weights
    for name in _WEIGHTS:
        if weights.is_adapted(name):
            continue
        active = _active(experts, experts.parameter_names[name])
        if _keeps_factors(active):
            left, right = _factors(*active[0])
            weights = weights._replace(**{f"{name}_left": left, f"{name}_right": right})
        elif active:
            total = sum((_delta(*one) for one in active), start=getattr(weights, name))
            weights = weights._replace(**{name: total})
    return weights


def adapter_rank(experts: ReplicatedExperts) -> int:
    """The adapter rank that a plan is priced for.

    It is the rank at which adapters of both projections would have as many elements as the trained factors have,
    rounded up. 0 where the weights themselves are trained, or nothing is.
    """
    weights = adapted_weights(experts)
    pairs = ((weights.gate_up_left, weights.gate_up_right), (weights.down_left, weights.down_right))
    trained = [f for pair in pairs for f in pair if f is not None and f.requires_grad]
    if weights.gate_up.requires_grad or weights.down.requires_grad or not trained:
        return 0
    elements = sum(factor[0].numel() for factor in trained)
    widths = experts.form.width(experts.intermediate_size) + experts.intermediate_size
    return -(-elements // (2 * experts.hidden_size + widths))


def _active(experts: ReplicatedExperts, attribute: str) -> list[tuple[Any, str]]:
    """(PEFT wrapper, name) of each adapter that a forward adds to this parameter."""
    found = []
    for wrapper in {id(factor.wrapper): factor.wrapper for factor in experts.adapters}.values():
        if wrapper.parameter_name == attribute and not wrapper.disable_adapters and not wrapper.merged:
            found += [(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
    return found


def _keeps_factors(active: list[tuple[Any, str]]) -> bool:
    """Whether a forward computes with the factors themselves (`nn.adapted`). In other cases PEFT 0.21 adds the
    adapters to the weights first."""
    return len(active) == 1 and active[0][0].num_experts > 1 and hasattr(active[0][0], "get_delta_factors")


def _factors(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    left, right, scaling = wrapper.get_delta_factors(adapter)
    return (left * scaling).contiguous(), right.contiguous()


def _delta(wrapper: Any, adapter: str) -> Tensor:
    delta: Tensor = wrapper.get_delta_weight(adapter)
    return delta


class LateGradients:
    """Gradients that replicas return when the batch closes, passed on to the adapters whose weights they are of."""

    def __init__(self) -> None:
        self._arrived: list[tuple[Callable[[], Sequence[Tensor]], list[Tensor]]] = []
        self._of_weights: list[tuple[nn.Parameter, Tensor]] = []

    def buffers(self, experts: ReplicatedExperts, own: ExpertWeights) -> ExpertWeights:
        """Buffers that gradients `[E/R, ...]` are added to: those in `own`, and new ones for weights with adapters."""
        for name in _WEIGHTS:
            attribute = experts.parameter_names[name]
            active, parameter = _active(experts, attribute), getattr(experts, attribute)
            if not any(p.requires_grad for wrapper, _ in active for p in wrapper.parameters()):
                continue
            if _keeps_factors(active):
                made = [torch.zeros_like(factor, dtype=torch.float32) for factor in _factors(*active[0])]
                own = own._replace(**dict(zip((f"{name}_left", f"{name}_right"), made, strict=True)))
                self._arrived.append((lambda one=active[0]: _factors(*one), made))  # type: ignore[misc]
            else:
                buffer = torch.zeros_like(parameter, dtype=torch.float32)
                own = own._replace(**{name: buffer})
                self._arrived += [(lambda one=one: [_delta(*one)], [buffer]) for one in active]  # type: ignore[misc]
                if parameter.requires_grad:
                    self._of_weights.append((parameter, buffer))
        return own

    def finish(self) -> None:
        for make, buffers in self._arrived:
            with torch.enable_grad():
                pairs = [(t, b) for t, b in zip(make(), buffers, strict=True) if t.requires_grad]
                torch.autograd.backward([t for t, _ in pairs], [b.to(t.dtype) for t, b in pairs])
        for parameter, buffer in self._of_weights:
            parameter.grad = buffer.to(parameter.dtype) + (0 if parameter.grad is None else parameter.grad)
        self._arrived.clear()
        self._of_weights.clear()
