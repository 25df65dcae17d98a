"""Gradients after a batch: summed or averaged over the ranks, and clipped by one norm over experts and all the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..comm.collectives import Comm

BUCKET = 1 << 25  # elements that are reduced together


def gradient(parameter: Tensor) -> Tensor | None:
    """`.grad`, or the `.main_grad` that stands in for it."""
    grad = parameter.grad
    return getattr(parameter, "main_grad", None) if grad is None else grad


def reduce_dense(comms: Sequence[Comm], parameters: Sequence[nn.Parameter], scale: float, device: torch.device) -> None:
    """Sum gradients over every group in turn and scale them, in place. Collective.

    A parameter without a gradient on any rank stays without one; one that lacks it on some ranks only counts as zero
    there.
    """
    if not parameters:
        return
    phase = "the reduction of dense gradients"
    present = torch.tensor([float(gradient(p) is not None) for p in parameters], device=device)
    for comm in comms:
        comm.all_reduce(present, phase)
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count and gradient(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
    reduce_tensors(comms, [grad for p in parameters if (grad := gradient(p)) is not None], scale, phase)


def reduce_tensors(comms: Sequence[Comm], tensors: Sequence[Tensor], scale: float, phase: str) -> None:
    """Sum over every group in turn and scale, in place, in buckets. Collective; the same tensors on every rank."""
    comms = [comm for comm in comms if comm.size > 1]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # the same order on every rank
        bucket: list[Tensor] = []
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        for index, tensor in enumerate(same):
            bucket.append(tensor)
            if index + 1 < len(same) and sum(t.numel() for t in bucket) + same[index + 1].numel() <= BUCKET:
                continue
            if comms:
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                for comm in comms:
                    comm.all_reduce(flat, phase)
                for into, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    into.copy_(summed.view_as(into))
            if scale != 1:
                torch._foreach_mul_(bucket, scale)
            bucket = []


def squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares, 0-d, in fp32 or, where any gradient is in it, float64."""
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    if not gradients:
        return torch.zeros((), dtype=dtype, device=device)
    norms = torch._foreach_norm([gradient.to(torch.promote_types(gradient.dtype, dtype)) for gradient in gradients])
    return torch.stack([norm.to(device=device, dtype=dtype) for norm in norms]).square().sum()


def total_norm(
    comm: Comm, experts: Sequence[nn.Parameter], dense: Sequence[nn.Parameter], device: torch.device
) -> Tensor:
    """Norm of all gradients of the model, 0-d, the same on every rank. Collective.

    Experts are counted once: summed over the expert-parallel group `comm`. Dense gradients are the same on every rank,
    or sharded (DTensor), and then summed over the shards.
    """
    own = [grad for p in experts if (grad := gradient(p)) is not None]
    everywhere = [grad for p in dense if (grad := gradient(p)) is not None]
    sharded = [grad for grad in everywhere if isinstance(grad, DTensor)]
    whole = [grad for grad in everywhere if not isinstance(grad, DTensor)]
    total = squared_norm(own, device).double()
    comm.all_reduce(total, "the gradients' norm")
    total += squared_norm(whole, device)
    for grad in sharded:
        norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        total += norm.full_tensor().double().to(device).square()
    return total.sqrt()


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that a norm above `max_norm` becomes it; as `torch.nn.utils.clip_grad_norm_` does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        grad = gradient(parameter)
        if grad is not None:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(factor.to(device=local.device, dtype=local.dtype))
