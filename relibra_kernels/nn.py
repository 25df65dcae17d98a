"""The layer as modules: `ReplicatedExperts`, `TopKRouter` with replay, and `ReplicatedMoE` of both."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from . import ops
from .autograd import moe_mlp
from .compiled import moe_mlp_functional
from .form import GPT_OSS, ExpertForm
from .planner.errors import InputError, ShapeError
from .router import TopKRouter, record_routing, replay_routing
from .weights import ExpertWeights

__all__ = [
    "ExpertForm",
    "ExpertWeights",
    "GPT_OSS",
    "ReplicatedExperts",
    "ReplicatedMoE",
    "TopKRouter",
    "record_routing",
    "replay_routing",
]

Dispatcher = Callable[["ReplicatedExperts", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@cache
def _parameter_names(first: str) -> dict[str, str]:
    return {f: f.replace("gate_up", first).replace("down", "down_proj") for f in ExpertWeights._fields}


class ReplicatedExperts(nn.Module):
    """All routed experts of one layer, with parameters named and shaped as Hugging Face names and shapes them.

    `gate_up_proj`, or `up_proj` where the form has no gate; `down_proj`; their biases and factors, None where there are
    none.

    Args:
        form: layout and activation; the default is that of Qwen3, DeepSeek and most others.
        recompute: save no pre-activation; backward computes it again (2/3 more expert FLOPs of one forward).

    Forward: hidden_states `[T, H]`, top_k_index `[T, K]` (-1 = dropped), top_k_weights `[T, K]` -> `[T, H]`.

    Attributes that the expert-parallel runtime and its adapters set:
        dispatcher: if set, forward is `dispatcher(self, hidden_states, top_k_index, top_k_weights)`.
        num_experts: experts whose parameters are on this rank. all_experts: those of the whole layer, or None where
            all were made here.
        layer: for a block of another framework, an object with these `experts` and a `router` whose `replay` can be
            set, as a `ReplicatedMoE` has them. None: the block is a `ReplicatedMoE`.
        adapters: PEFT's low-rank factors of the parameters.
    """

    gate_up_proj: nn.Parameter  # or up_proj

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        form: ExpertForm | None = None,
        recompute: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is {size}; it must be positive")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.form = form or ExpertForm()
        self.recompute = recompute
        self.dispatcher: Dispatcher | None = None
        self.layer: Any = None
        self.all_experts: int | None = None
        self.adapters: list[Any] = []

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype, device=device))

        first, width = self.form.first_name, self.form.width(intermediate_size)
        self.register_parameter(first, parameter(*self.form.gate_up_shape(hidden_size, intermediate_size)))
        self.down_proj = parameter(*self.form.down_shape(hidden_size, intermediate_size))
        self.register_parameter(f"{first}_bias", parameter(width) if self.form.has_bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if self.form.has_bias else None)
        for name in (f"{first}_left", f"{first}_right", "down_proj_left", "down_proj_right"):
            self.register_parameter(name, None)  # until `adapt`
        self.reset_parameters()

    @property
    def weights(self) -> ExpertWeights:
        """The parameters, as the functions of `autograd` take them; under PEFT's adapters with their factors beside."""
        own, names = self._parameters, self.parameter_names.values()
        if not self._modules and all(map(own.__contains__, names)):  # nobody has put anything in a parameter's place
            return ExpertWeights(*map(own.get, names))
        return adapted(self, self.form)

    @property
    def parameter_names(self) -> dict[str, str]:
        """Field of `ExpertWeights` -> attribute, in the order of the fields."""
        return _parameter_names(self.form.first_name)

    @property
    def is_transposed(self) -> bool:
        """Of the form; PEFT asks for it where it names an adapter's factors."""
        return self.form.is_transposed

    def adapt(self, rank: int) -> None:
        """Freeze the parameters, and train low-rank terms beside them: `W[e] + left[e] @ right[e]`, never added up.

        The factors of a weight `[E, A, B]` are parameters `[E, A, rank]` and `[E, rank, B]`, in its dtype. Of the two,
        the one that makes the output begins at zero, so that nothing changes at first. There is no alpha: it would be a
        factor of that one's learning rate.

        Raises: InputError where the rank is not positive, or there are factors already.
        """
        if rank < 1:
            raise InputError(f"rank is {rank}; it must be positive")
        if self.down_proj_left is not None:
            raise InputError("the experts have factors already")
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in (self.form.first_name, "down_proj"):
            weight = getattr(self, name)
            left = nn.Parameter(weight.new_zeros(*weight.shape[:2], rank))
            right = nn.Parameter(weight.new_zeros(weight.shape[0], rank, weight.shape[2]))
            inner, of_input = (left, weight.shape[1]) if self.form.is_transposed else (right, weight.shape[2])
            nn.init.normal_(inner, std=of_input**-0.5)
            setattr(self, f"{name}_left", left)
            setattr(self, f"{name}_right", right)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights, zero biases."""
        for name in (self.form.first_name, "down_proj"):
            nn.init.normal_(getattr(self, name), std=std)
            bias = getattr(self, f"{name}_bias")
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.dispatcher is not None:
            return self.dispatcher(self, hidden_states, top_k_index, top_k_weights)
        if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
            raise ShapeError(
                f"hidden_states is {tuple(hidden_states.shape)}, top_k_index {tuple(top_k_index.shape)} and "
                f"top_k_weights {tuple(top_k_weights.shape)}; they must be [T, H], [T, K] and [T, K]"
            )
        x_TH, weights_TK = hidden_states.contiguous(), top_k_weights.contiguous()
        if torch.compiler.is_compiling():
            return moe_mlp_functional(x_TH, weights_TK, top_k_index, self.weights, self.form, recompute=self.recompute)
        schedule = ops.build_schedule(top_k_index, self.num_experts)
        return moe_mlp(x_TH, weights_TK, schedule, self.weights, self.form, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"


def adapted(experts: nn.Module, form: ExpertForm) -> ExpertWeights:
    """The weights and biases of an experts module, and the weights' factors.

    Factors are the module's own (`ReplicatedExperts.adapt`), or those that PEFT puts in a parameter's place while it
    runs: there the parameter is not what it names, but the sum, which would be made by asking for it.
    """
    first, first_left, first_right = _with_factors(experts, form.first_name)
    down, down_left, down_right = _with_factors(experts, "down_proj")
    first_bias, down_bias = (
        getattr(experts, f"{name}_bias") if form.has_bias else None for name in (form.first_name, "down_proj")
    )
    return ExpertWeights(first, down, first_bias, down_bias, first_left, first_right, down_left, down_right)


def _with_factors(experts: Any, attribute: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A weight and its factors."""
    places = experts._modules.get("parametrizations")
    if isinstance(places, nn.ModuleDict) and attribute in places:
        place: Any = places[attribute]
        terms = [(t.lhs * t.scaling, t.rhs) for t in place if all(hasattr(t, n) for n in ("lhs", "rhs", "scaling"))]
        if len(place) == len(terms) == 1:
            return place.original, terms[0][0].contiguous(), terms[0][1].contiguous()
    left, right = (getattr(experts, f"{attribute}_{side}", None) for side in ("left", "right"))
    return getattr(experts, attribute), left, right


class ReplicatedMoE(nn.Module):
    """Router, experts and optional shared experts: `[B, S, H] -> [B, S, H]`, also `[T, H] -> [T, H]`.

    The router is the attribute `gate`, so that state dicts have the keys of the Hugging Face blocks.
    """

    def __init__(self, router: TopKRouter, experts: ReplicatedExperts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = experts  # before the router, as in the Hugging Face blocks: optimizers go by this order
        self.gate = router
        self.shared_experts = shared_experts

    @property
    def router(self) -> TopKRouter:
        return self.gate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        is_flat = hidden_states.ndim == 2
        x_TH = hidden_states if is_flat else hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, indices_TK = self.gate(x_TH)
        out_TH = self.experts(x_TH, indices_TK, weights_TK)
        if self.shared_experts is not None:
            out_TH = out_TH + self.shared_experts(x_TH)
        return out_TH if is_flat else out_TH.view_as(hidden_states)
