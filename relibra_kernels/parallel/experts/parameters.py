"""The MoE layers of a model, their expert parameters on one rank, and the tensors that go with those."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...frameworks import TAKE_OVER
from ...nn import ReplicatedExperts, ReplicatedMoE
from ...planner.errors import InputError
from .adapters import keep_adapted, kept_rows
from .migration import expert_tensors


def take_over(model: nn.Module) -> list[ReplicatedMoE]:
    """The MoE layers of a model, in order. Those of another framework are taken over where they were not.

    Raises: InputError where it has none.
    """
    layers = _layers_of(model)
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    for package in () if layers else sorted(packages & TAKE_OVER.keys()):
        TAKE_OVER[package](model)
        layers = _layers_of(model)
    if not layers:
        others = " or ".join(TAKE_OVER)
        raise InputError(f"model {type(model).__name__} has no ReplicatedMoE, and no experts of {others} to take over")
    return layers


def _layers_of(model: nn.Module) -> list[ReplicatedMoE]:
    layers: list[ReplicatedMoE] = []
    for module in model.modules():
        if isinstance(module, ReplicatedMoE):
            layers.append(module)
        elif isinstance(module, ReplicatedExperts) and module.layer is not None:
            layers.append(module.layer)
    return layers


def layers_to_share(model: nn.Module) -> list[ReplicatedMoE]:
    """All of a model, as `take_over` finds them, each still with all of its experts, equally many.

    Raises: InputError where that is not so.
    """
    layers = take_over(model)
    for layer, moe in enumerate(layers):
        for name, parameter in expert_parameters(moe.experts):
            if isinstance(parameter, DTensor) and moe.experts.all_experts is None:
                raise InputError(
                    f"{name} of MoE layer {layer} is a DTensor on {parameter.device_mesh}, but must be a plain tensor: "
                    "leave experts out of tensor parallelism, and make ExpertParallel before fully_shard"
                )
    counts = {all_experts(moe.experts) for moe in layers}
    if len(counts) > 1 or any(moe.experts.dispatcher is not None for moe in layers):
        raise InputError(f"every MoE layer must have all of its experts, equally many; they have {sorted(counts)}")
    return layers


def device_of(layers: Sequence[ReplicatedMoE]) -> torch.device:
    """Where the experts are."""
    return layers[0].experts.down_proj.device


def expert_parameters(experts: ReplicatedExperts) -> list[tuple[str, nn.Parameter]]:
    """The parameters that there are, by attribute, then the factors of their adapters, by name."""
    pairs = [(attribute, getattr(experts, attribute)) for attribute in experts.parameter_names.values()]
    pairs += [(factor.name, factor.linear.weight) for factor in experts.adapters]
    return [(attribute, parameter) for attribute, parameter in pairs if parameter is not None]


def tensors_to_move(experts: ReplicatedExperts, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What moves with the experts of a layer, by name, in a fixed order."""
    views = {factor.name: factor.by_expert for factor in experts.adapters}
    return {
        name: views.get(attribute, _as_it_is)(tensor)
        for attribute, parameter in expert_parameters(experts)
        for name, tensor in expert_tensors(parameter, attribute, optimizer).items()
    }


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def all_experts(experts: ReplicatedExperts) -> int:
    """How many experts the layer has over all ranks, also where only this rank's share of them was made."""
    return experts.all_experts or experts.num_experts


def keep_experts(experts: ReplicatedExperts, kept: Sequence[int], home_slots: int) -> None:
    """Replace each parameter of all experts by one of the kept ones, [home_slots, ...]. A slot beyond them is zeros.

    Where only this rank's share was made, it stays.
    """
    if experts.all_experts is not None:
        return
    keep_adapted(experts, kept, home_slots)
    for attribute in experts.parameter_names.values():
        parameter = getattr(experts, attribute)
        if parameter is not None:
            local = nn.Parameter(kept_rows(parameter.detach(), kept, home_slots), parameter.requires_grad)
            setattr(experts, attribute, local)
    experts.num_experts = home_slots
