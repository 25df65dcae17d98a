"""Experts in logical order [E, ...], whatever the placement."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn import ReplicatedMoE
from .comm import Comm
from .experts import expert_parameters


def layer_of_parameter(layers: Sequence[ReplicatedMoE]) -> dict[int, int]:
    """MoE layer of every expert parameter, by its id."""
    return {id(p): layer for layer, moe in enumerate(layers) for _, p in expert_parameters(moe.experts)}


def logical_tensors(
    model: nn.Module,
    layers: Sequence[ReplicatedMoE],
    home_LE: np.ndarray,
    comm: Comm,
    tensor_of: Callable[[nn.Parameter], Tensor | None],
) -> Iterator[tuple[str, Tensor | None]]:
    """`tensor_of` every parameter under its name in the whole model, one gathered at a time. Collective."""
    layer_of = layer_of_parameter(layers)
    for name, parameter in model.named_parameters():
        tensor = tensor_of(parameter)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if tensor is None or id(parameter) not in layer_of:
            yield name, tensor
            continue
        by_rank = comm.gather_tensors(tensor, f"gathering {name}")
        order = torch.from_numpy(np.argsort(home_LE[layer_of[id(parameter)]], kind="stable")).to(tensor.device)
        yield name, torch.empty_like(by_rank.flatten(0, 1)).index_copy_(0, order, by_rank.flatten(0, 1))
