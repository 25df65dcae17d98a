"""The expert parameters of a layer on one rank, and the tensors that go with them."""

import torch
from torch import Tensor, nn

from ..nn import ReplicatedExperts
from .migration import expert_tensors

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


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


def keep_experts(experts: ReplicatedExperts, kept: slice) -> None:
    """Replace each parameter of all experts by one of the kept ones."""
    for attribute, parameter in expert_parameters(experts):
        local = nn.Parameter(parameter.detach()[kept].clone(), requires_grad=parameter.requires_grad)
        setattr(experts, attribute, local)
    experts.num_experts = kept.stop - kept.start
