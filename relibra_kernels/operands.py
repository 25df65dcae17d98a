"""What both backends refuse before anything is computed. Nothing here looks at values."""

import torch

from .planner.errors import ShapeError
from .schedule import Schedule

COMPUTABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # float64 in the reference only


def check_computable(name: str, tensor: torch.Tensor) -> None:
    """Refuse tensors of numbers that stand for others: integers and fp8 mean something only together with their scales.

    Raises: ShapeError, with the tensor's name and dtype.
    """
    if tensor.dtype not in COMPUTABLE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTABLE)
        raise ShapeError(f"{name} is {tensor.dtype}; it must be one of {names}: no quantised weights")


def check_rows(name: str, rows: torch.Tensor, count: int) -> None:
    """Refuse rows that are not contiguous `[count, ...]`."""
    if rows.ndim != 2 or not rows.is_contiguous() or len(rows) != count:
        raise ShapeError(
            f"{name} is {tuple(rows.shape)} with strides {rows.stride()}; it must be contiguous with {count} rows"
        )


def check_operands(rows: torch.Tensor, count: int, *weights: torch.Tensor | None) -> None:
    """Refuse rows that are not contiguous `[count, ...]`, and weights in another dtype or not contiguous."""
    check_rows("the rows", rows, count)
    check_computable("the rows", rows)
    for weight in weights:
        if weight is not None and (weight.dtype != rows.dtype or not weight.is_contiguous()):
            raise ShapeError(
                f"a weight is {weight.dtype} {tuple(weight.shape)} with strides {weight.stride()}; "
                f"it must be contiguous {rows.dtype}"
            )


def check_gate_weights(weights_TK: torch.Tensor, schedule: Schedule) -> None:
    """Refuse gate weights that are not contiguous floating `[T, K]`."""
    shape = tuple(schedule.position_of.shape)
    if tuple(weights_TK.shape) != shape or not weights_TK.is_floating_point() or not weights_TK.is_contiguous():
        raise ShapeError(
            f"weights is {weights_TK.dtype} {tuple(weights_TK.shape)} with strides {weights_TK.stride()}; "
            f"it must be contiguous, floating and {shape}"
        )


def check_shards(shards: torch.Tensor, grad: torch.Tensor, expert_of_shard: torch.Tensor) -> None:
    """Refuse shards `[P, ...]` that cannot be added to experts of `grad` `[E, ...]`."""
    if not grad.dtype.is_floating_point or grad.element_size() < 4 or shards.shape[1:] != grad.shape[1:]:
        raise ShapeError(
            f"grad is {grad.dtype} {tuple(grad.shape)} and shards {tuple(shards.shape)}; "
            "grad must be float32 and both must agree beyond their first axis"
        )
    if not grad.is_contiguous() or not shards.is_contiguous():
        raise ShapeError(f"grad has strides {grad.stride()} and shards {shards.stride()}; both must be contiguous")
    if expert_of_shard.shape != shards.shape[:1]:
        raise ShapeError(f"expert_of_shard is {tuple(expert_of_shard.shape)}; it must be [{len(shards)}]")


def check_grad(grad: torch.Tensor, shape: tuple[int, ...], accumulate: bool) -> None:
    """Refuse a gradient buffer that sums would not fit into."""
    if tuple(grad.shape[1:]) != shape or not grad.is_contiguous() or (accumulate and grad.dtype != torch.float32):
        raise ShapeError(
            f"grad is {grad.dtype} {tuple(grad.shape)} with strides {grad.stride()}; it must be contiguous [E, "
            f"{', '.join(map(str, shape))}]" + (" and float32" if accumulate else "")
        )
