"""Experts as rows of one tensor: what a replica's weights, or its gradients, travel as."""

import torch
from torch import Tensor

from ... import ops
from ...weights import ExpertWeights, replica_store


def pack(weights: ExpertWeights, experts: Tensor | None = None) -> Tensor:
    """[P, elements of an expert]: gate_up, down and biases of these experts, one after the other.

    Args:
        weights: [E, ...] each, all of one dtype. experts: int64 [P]; None: all of them in order.
    """
    whole = [tensor.detach() for tensor in weights.tensors()]
    rows = whole if experts is None else [ops.pack_replicas(tensor, experts) for tensor in whole]
    return torch.cat([part.flatten(1) for part in rows], 1)


def unpack(blob: Tensor, like: ExpertWeights, extra: int = 0) -> ExpertWeights:
    """The experts of `blob` [P, ...] as new tensors [P + extra, ...], each a whole number of experts from its like.

    They have the shapes and dtypes of `like` [E, ...]; the last `extra` experts are undefined.
    """
    sizes = [tensor.shape[1:].numel() for tensor in like.tensors()]
    parts = iter(blob.split(sizes, 1))

    def part(tensor: Tensor) -> Tensor:
        store = replica_store(tensor, len(blob) + extra)
        store[: len(blob)].copy_(next(parts).view(len(blob), *tensor.shape[1:]))
        return store

    return like.map(part)
