"""The MoE layers of a model, their expert parameters on one rank, and the tensors that go with those."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn import ReplicatedExperts, ReplicatedMoE
from ...planner.errors import InputError
from .migration import expert_tensors

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def moe_layers(model: nn.Module) -> list[ReplicatedMoE]:
    """All of a model, in order, each still with all of its experts, equally many.

    Raises: InputError where that is not so.
    """
    layers = [module for module in model.modules() if isinstance(module, ReplicatedMoE)]
    if not layers:
        raise InputError(f"model {type(model).__name__} has no ReplicatedMoE: replace its MoE blocks first")
    counts = {moe.experts.num_experts for moe in layers}
    if len(counts) > 1 or any(moe.experts.dispatcher is not None for moe in layers):
        raise InputError(f"every MoE layer must have all of its experts, equally many; they have {sorted(counts)}")
    return layers


def device_of(layers: Sequence[ReplicatedMoE]) -> torch.device:
    """Where the experts are."""
    return layers[0].experts.gate_up_proj.device


def expert_parameters(experts: ReplicatedExperts) -> list[tuple[str, nn.Parameter]]:
    """The parameters that there are, by attribute."""
    pairs = [(attribute, getattr(experts, attribute)) for attribute in EXPERT_PARAMETERS]
    return [(attribute, parameter) for attribute, parameter in pairs if parameter is not None]


def tensors_to_move(experts: ReplicatedExperts, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What moves with the experts of a layer, by name, in a fixed order."""
    return {
        name: tensor
        for attribute, parameter in expert_parameters(experts)
        for name, tensor in expert_tensors(parameter, attribute, optimizer).items()
    }


def keep_experts(experts: ReplicatedExperts, kept: Sequence[int], home_slots: int) -> None:
    """Replace each parameter of all experts by one of the kept ones, [home_slots, ...]. A slot beyond them is zeros."""
    for attribute, parameter in expert_parameters(experts):
        local = parameter.new_zeros((home_slots, *parameter.shape[1:]))
        local[: len(kept)] = parameter.detach()[list(kept)]
        setattr(experts, attribute, nn.Parameter(local, requires_grad=parameter.requires_grad))
    experts.num_experts = home_slots
