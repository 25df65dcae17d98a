"""What both backends refuse before anything is computed. Nothing here looks at values."""

import torch

from .planner.errors import ShapeError
from .schedule import Schedule


def check_rows(name: str, rows: torch.Tensor, count: int) -> None:
    """Refuse rows that are not contiguous `[count, ...]`."""
    if rows.ndim != 2 or not rows.is_contiguous() or len(rows) != count:
        raise ShapeError(
            f"{name} is {tuple(rows.shape)} with strides {rows.stride()}; it must be contiguous with {count} rows"
        )


def check_operands(rows: torch.Tensor, count: int, *weights: torch.Tensor | None) -> None:
    """Refuse rows that are not contiguous `[count, ...]`, and weights in another dtype or not contiguous."""
    check_rows("the rows", rows, count)
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


def check_same_rows(y_RH: torch.Tensor, dout_TH: torch.Tensor) -> None:
    """Refuse rows and tokens of different widths or dtypes."""
    if y_RH.shape[1:] != dout_TH.shape[1:] or y_RH.dtype != dout_TH.dtype:
        raise ShapeError(
            f"y is {y_RH.dtype} {tuple(y_RH.shape)} and dout {dout_TH.dtype} {tuple(dout_TH.shape)}; "
            "they must have the same dtype and width"
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
