"""Memory in which rows are sent, received and combined: one allocation a purpose, used by every layer in turn."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """One buffer and its parts, all of them views: the rows that come, then those that stay, then those that leave.

    `here`: the rows that come and those that stay; `come`: the first of them. `sent`: those that stay and those that
    leave; `leave`: the last of them.
    """

    here: Tensor
    come: Tensor
    sent: Tensor
    leave: Tensor


class Shape(NamedTuple):
    """What a buffer is to hold: how many rows come, stay and leave, and what a row is."""

    come: int
    stay: int
    leave: int
    width: int
    dtype: torch.dtype


class Buffers:
    """Bytes by name, as many as the largest use so far.

    Attributes:
        memory: uint8 by (name, device).
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.device], Tensor] = {}
        self._rows: dict[tuple[str, torch.device, Shape], Rows] = {}  # made already

    def reserve(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """Let every name have so many bytes; what was taken under one that grows is lost."""
        for name, size in sizes.items():
            known = self.memory.get((name, device))
            if known is None or known.numel() < size:
                del known
                self.forget_rows()
                self.memory.pop((name, device), None)  # before its successor is there
                self.memory[name, device] = torch.empty(size, dtype=torch.uint8, device=device)

    def forget_rows(self) -> None:
        """Views that were made are made again where they are taken: those of a micro-batch, once it is over."""
        self._rows.clear()

    def take(self, name: str, device: torch.device, shape: Shape) -> Rows:
        """Uninitialised rows. What was taken under this name before is overwritten."""
        key = name, device, shape
        rows = self._rows.get(key)
        return self._make(*key) if rows is None else rows

    def _make(self, name: str, device: torch.device, shape: Shape) -> Rows:
        come, stay, leave, width, dtype = shape
        here, every = come + stay, come + stay + leave
        size = every * width * dtype.itemsize
        self.reserve({name: size}, device)
        rows = self.memory[name, device][:size].view(dtype).view(every, width)
        made = self._rows[name, device, shape] = Rows(rows[:here], rows[:come], rows[come:], rows[here:])
        return made
