"""Memory in which rows are sent, received and combined: one allocation a purpose, used by every layer in turn."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Buffers:
    """Bytes by name, as many as the largest use so far.

    Attributes:
        memory: uint8 by (name, device).
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.device], Tensor] = {}

    def reserve(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """Let every name have so many bytes; what was taken under one that grows is lost."""
        for name, size in sizes.items():
            known = self.memory.get((name, device))
            if known is None or known.numel() < size:
                del known
                self.memory.pop((name, device), None)  # before its successor is there
                self.memory[name, device] = torch.empty(size, dtype=torch.uint8, device=device)

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised `shape` of `like`'s dtype and device. What was taken under this name before is overwritten."""
        size = math.prod(shape) * like.element_size()
        memory = self.memory.get((name, like.device))
        if memory is None or memory.numel() < size:
            self.reserve({name: size}, like.device)
            memory = self.memory[name, like.device]
        return memory[:size].view(like.dtype).view(*shape)
