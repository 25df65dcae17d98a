"""What both backends refuse before anything is computed. Nothing here looks at values."""

import torch

from .form import ExpertForm
from .planner.errors import ShapeError
from .schedule import Schedule
from .weights import ExpertWeights

COMPUTABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # float64 in the reference only


def check_computable(name: str, tensor: torch.Tensor) -> None:
    """Refuse quantised tensors: integers and fp8 mean something only together with their scales.

    Raises: ShapeError, with the tensor's name and dtype.
    """
    if tensor.dtype not in COMPUTABLE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTABLE)
        raise ShapeError(f"{name} is {tensor.dtype}; it must be one of {names}: no quantised weights")


def check_rows(name: str, rows: torch.Tensor, count: int) -> None:
    """Refuse rows that are not contiguous `[count, ...]`."""
    if rows.ndim != 2 or not rows.is_contiguous() or rows.shape[0] != count:
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


def check_layer(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    schedule: Schedule,
    home: ExpertWeights,
    form: ExpertForm,
    replica: ExpertWeights | None,
    weight_of_slot: torch.Tensor | None,
) -> None:
    """Refuse tensors that do not fit each other, before anything is computed. Looks at no values."""
    if x_TH.ndim != 2 or not x_TH.is_contiguous():
        raise ShapeError(f"x is {tuple(x_TH.shape)} with strides {x_TH.stride()}; it must be contiguous [T, H]")
    if schedule.num_tokens != x_TH.shape[0] or weights_TK.shape != schedule.position_of.shape:
        raise ShapeError(
            f"x is {tuple(x_TH.shape)}, weights {tuple(weights_TK.shape)} and the schedule for [T, K] = "
            f"{tuple(schedule.position_of.shape)}; they must be [T, H], [T, K] and that same [T, K]"
        )
    if not weights_TK.is_floating_point() or not weights_TK.is_contiguous():
        raise ShapeError(
            f"weights is {weights_TK.dtype} with strides {weights_TK.stride()}; it must be contiguous and floating"
        )
    check_weights(home, x_TH, form, "home")
    if replica is not None:
        check_weights(replica, x_TH, form, "replica")
        if [a is None for a in home] != [b is None for b in replica]:
            there = [
                [name for name, tensor in store._asdict().items() if tensor is not None] for store in (home, replica)
            ]
            raise ShapeError(f"the home weights have {there[0]} and the replica weights {there[1]}; they must be alike")
    if weight_of_slot is not None and (
        weight_of_slot.shape != (schedule.num_slots,) or weight_of_slot.dtype != torch.int32
    ):
        raise ShapeError(
            f"weight_of_slot is {weight_of_slot.dtype} {tuple(weight_of_slot.shape)}; "
            f"it must be int32 [{schedule.num_slots}]"
        )
    if weight_of_slot is None and home.down is not None and len(home.down) < schedule.num_slots:
        raise ShapeError(
            f"weight_of_slot is None with {schedule.num_slots} slots and {len(home.down)} home experts; "
            "slots beyond the home experts need it"
        )
    for name, tensor in (
        ("weights", weights_TK),
        ("schedule", schedule.slot_offsets),
        ("weight_of_slot", weight_of_slot),
    ):
        if tensor is not None and tensor.device != x_TH.device:
            raise ShapeError(f"{name} is on {tensor.device} and x on {x_TH.device}; they must be on the same device")


def check_weights(weights: ExpertWeights, x_TH: torch.Tensor, form: ExpertForm, store: str) -> None:
    """Refuse a store of weights whose layout is not `form`'s, or that does not go with x."""
    gate_up, down = weights.gate_up, weights.down
    if gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3 or len(gate_up) != len(down):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in weights]
        raise ShapeError(f"the {store} weights are {shapes}; gate_up and down must be [E, ...] with the same E")
    hidden_size = x_TH.shape[1]
    intermediate_size = down.shape[1 if form.is_transposed else 2]
    expected = (form.gate_up_shape(hidden_size, intermediate_size), form.down_shape(hidden_size, intermediate_size))
    if (tuple(gate_up.shape[1:]), tuple(down.shape[1:])) != expected:
        width = "2I" if form.has_gate else "I"
        raise ShapeError(
            f"the {store} gate_up is {tuple(gate_up.shape)} and down {tuple(down.shape)}; with hidden size "
            f"{hidden_size} and is_transposed={form.is_transposed} they must be "
            + (f"[E, H, {width}] and [E, I, H]" if form.is_transposed else f"[E, {width}, H] and [E, H, I]")
        )
    biases = [None if bias is None else tuple(bias.shape) for bias in (weights.gate_up_bias, weights.down_bias)]
    with_bias = [(len(gate_up), form.width(intermediate_size)), (len(down), hidden_size)]
    if biases != (with_bias if form.has_bias else [None, None]):
        raise ShapeError(
            f"the {store} biases are {biases}; with has_bias={form.has_bias} they must be {with_bias} or None"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        factors = [getattr(weights, f"{name}_{side}") for side in ("left", "right")]
        shapes = [None if factor is None else tuple(factor.shape) for factor in factors]
        experts, rows, columns = weight.shape
        rank = shapes[0][2] if shapes[0] and len(shapes[0]) == 3 else 0
        if shapes not in ([None, None], [(experts, rows, rank), (experts, rank, columns)]) or (
            shapes[0] is not None and not rank
        ):
            raise ShapeError(
                f"the {store} factors of {name} are {shapes}; they must be [{experts}, {rows}, r] and "
                f"[{experts}, r, {columns}] with r at least 1, or both None"
            )
    for name, tensor in weights._asdict().items():
        if tensor is None:
            continue
        check_computable(f"the {store} {name}", tensor)
        if tensor.dtype != x_TH.dtype or tensor.device != x_TH.device:
            raise ShapeError(
                f"the {store} {name} is {tensor.dtype} on {tensor.device} and x {x_TH.dtype} on {x_TH.device}; "
                "they must be the same"
            )
        if not tensor.is_contiguous():
            raise ShapeError(f"the {store} {name} has strides {tensor.stride()}; it must be contiguous")
