"""Whether ranks that must hold the same weights do: compared once, by an exact number for the bits of each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn import ReplicatedMoE
from .checks import checksum
from .groups import Groups
from .logical import layer_of_parameter

CHUNK = 1 << 22  # elements that are looked at together
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes an element; wider ones in words of eight


def digest(tensor: Tensor) -> Tensor:
    """Sum of (2 i + 1) times the bits of element i, modulo 2^64: int64, 0-d, on the tensor's device.

    The factors are odd, so that two tensors that differ in one element never have the same.
    """
    flat = tensor.detach().reshape(-1)
    words = flat.view(INTEGERS.get(flat.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        total += (torch.arange(start, start + len(part), device=words.device).mul_(2).add_(1) * part).sum()
    return total


def check_same_weights(model: nn.Module, layers: Sequence[ReplicatedMoE], groups: Groups, device: torch.device) -> None:
    """Every rank has the same dense parameters, and ranks that hold copies of experts the same experts. Collective.

    Sharded parameters (DTensor) are not looked at, nor are buffers, which may differ.
    Raises: InputError naming a rank and the first parameter that differs.
    """
    experts = layer_of_parameter(layers)
    whole = {f"parameter {n}": p for n, p in model.named_parameters() if not isinstance(p, DTensor)}
    dense = {name: p for name, p in whole.items() if id(p) not in experts}
    copied = {name: p for name, p in whole.items() if id(p) in experts and groups.copies}
    what = "comparing the weights"
    kinds = [(name, tuple(p.shape), p.dtype) for name, p in dense.items()]
    groups.agree(None, {"the list of dense parameters": checksum(kinds)}, device, what)
    groups.agree(None, _digests(dense, device), device, what, of_copies=_digests(copied, device))


def _digests(parameters: dict[str, nn.Parameter], device: torch.device) -> dict[str, int]:
    each = [digest(parameter).to(device) for parameter in parameters.values()]
    return dict(zip(parameters, torch.stack(each).tolist() if each else [], strict=True))
