"""Checksums of what must be the same on every rank. Equal data gives equal checksums, on any rank and device."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..nn import ReplicatedMoE
from .experts.parameters import expert_parameters

CHUNK = 1 << 22  # elements that are looked at together
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes an element; wider ones in words of eight


def checksum(*values: object) -> int:
    """The same number on every rank that has the same values: arrays by their bytes, others by their repr."""
    total = 0
    for value in values:
        if isinstance(value, np.ndarray):
            total = zlib.crc32(np.ascontiguousarray(value).tobytes(), zlib.crc32(repr(value.shape).encode(), total))
        else:
            total = zlib.crc32(repr(value).encode(), total)
    return total


def model_digest(layers: Sequence[ReplicatedMoE]) -> int:
    """Of everything about the MoE layers that ranks must share: shapes, dtypes, form, what is trained."""
    return checksum(
        *(
            (moe.experts.form, moe.experts.recompute, attribute, tuple(p.shape), p.dtype, p.requires_grad)
            for moe in layers
            for attribute, p in expert_parameters(moe.experts)
        )
    )


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


def digests(parameters: Mapping[str, Tensor], device: torch.device) -> dict[str, int]:
    """`digest` of each, read back together."""
    each = [digest(parameter).to(device) for parameter in parameters.values()]
    return dict(zip(parameters, torch.stack(each).tolist() if each else [], strict=True))
