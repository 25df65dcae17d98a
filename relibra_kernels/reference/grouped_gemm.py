"""Products of ragged groups of rows with their slot's weights: one matmul a non-empty slot, in slot order.

Weights come from two stores, home `[E, ...]` and an optional replica buffer `[S, ...]`; `weight_of_slot` indexes their
concatenation, None means slot i uses weight i. A slot without rows costs nothing and its weight is never read.
Operands are multiplied in `operand_dtype`: as they are, or in fp32 where the CPU has no fast product of theirs.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from ..form import ExpertForm
from ..operands import check_gate_weights, check_operands
from ..schedule import Schedule
from .matmul import operand_dtype
from .swiglu import swiglu, swiglu_backward

CHUNK_ROWS = 2048  # bounds the fp32 temporaries of the elementwise parts (6 MB each at I = 768)


def grouped_gemm(
    a: torch.Tensor,
    weight: torch.Tensor,
    schedule: Schedule,
    *,
    transpose_weight: bool,
    gather: bool = False,
    bias: torch.Tensor | None = None,
    replica_weight: torch.Tensor | None = None,
    replica_bias: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out[r] = a[r] @ W[slot of r] (+ bias)`, `[rows, N]`; rows of the unused tail are undefined.

    Args:
        a: `[rows, D]` rows in slot order, or `[T, D]` tokens with `gather`.
        weight: `[E, D, N]`, or `[E, N, D]` with `transpose_weight`.
    """
    check_operands(a, schedule.num_tokens if gather else schedule.num_rows, weight, replica_weight, bias, replica_bias)
    operand = operand_dtype(a)
    weights, biases = _Store(weight, replica_weight, operand), _Store(bias, replica_bias, operand)
    weight_ids = slot_weights(schedule, weight_of_slot)
    out = a.new_empty(schedule.num_rows, weight.shape[1 if transpose_weight else 2])
    for slot, rows in filled_slots(schedule, None if operand == a.dtype else CHUNK_ROWS):
        w = weights[weight_ids[slot]]
        w = w.t() if transpose_weight else w
        _product(_rows(a, rows, schedule, gather, operand), w, biases, weight_ids[slot], out[rows])
    return out


def grouped_gemm_swiglu(
    x_TH: torch.Tensor,
    gate_up: torch.Tensor,
    schedule: Schedule,
    form: ExpertForm,
    *,
    bias: torch.Tensor | None = None,
    replica_gate_up: torch.Tensor | None = None,
    replica_bias: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = gather(x) @ gate_up (+ bias)`, `a = swiglu(h)`: `([rows, 2I], [rows, I])`; both `[rows, I]` without gate."""
    check_operands(x_TH, schedule.num_tokens, gate_up, replica_gate_up, bias, replica_bias)
    operand = operand_dtype(x_TH)
    weights, biases = _Store(gate_up, replica_gate_up, operand), _Store(bias, replica_bias, operand)
    weight_ids = slot_weights(schedule, weight_of_slot)
    columns = gate_up.shape[2 if form.is_transposed else 1]
    h_RJ = x_TH.new_empty(schedule.num_rows, columns)
    a_RI = x_TH.new_empty(schedule.num_rows, form.intermediate_size(columns))
    for slot, rows in filled_slots(schedule, CHUNK_ROWS):
        w = weights[weight_ids[slot]]
        w = w if form.is_transposed else w.t()
        x = _rows(x_TH, rows, schedule, True, operand)
        a_RI[rows] = swiglu(_product(x, w, biases, weight_ids[slot], h_RJ[rows]), form)
    return h_RJ, a_RI


def grad_hidden(
    dout_TH: torch.Tensor,
    h_RJ: torch.Tensor,
    weights_TK: torch.Tensor,
    down: torch.Tensor,
    schedule: Schedule,
    form: ExpertForm,
    *,
    bias: torch.Tensor | None = None,
    replica_down: torch.Tensor | None = None,
    replica_bias: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the output's gradient back to h: `(dh as h, w*a [rows, I], dweights [T, K] in fp32)`.

    With `g[r] = dout[t] @ down`: `dweights = <g, a> + <dout, bias>`, `dh = dSwiGLU(w * g, h)`. `w*a` is what the
    gradient of `down` contracts with dout.
    """
    check_operands(dout_TH, schedule.num_tokens, down, replica_down, bias, replica_bias)
    check_operands(h_RJ, schedule.num_rows, down)
    check_gate_weights(weights_TK, schedule)
    operand = operand_dtype(dout_TH)
    weights, biases = _Store(down, replica_down, operand), _Store(bias, replica_bias)
    weight_ids = slot_weights(schedule, weight_of_slot)
    accumulate = torch.promote_types(h_RJ.dtype, torch.float32)
    dh_RJ = torch.empty_like(h_RJ)
    wa_RI = h_RJ.new_empty(h_RJ.shape[0], form.intermediate_size(h_RJ.shape[1]))
    dweights = torch.zeros(schedule.position_of.numel(), dtype=accumulate, device=h_RJ.device)
    flat_weights = weights_TK.reshape(-1)
    for slot, rows in filled_slots(schedule, CHUNK_ROWS):
        w = weights[weight_ids[slot]]
        assignment = schedule.assignment_of[rows].long()
        dout = _rows(dout_TH, rows, schedule, True, operand)
        g_RI = (dout @ (w.t() if form.is_transposed else w)).to(accumulate)
        gate_weight = flat_weights[assignment].to(accumulate)[:, None]
        dh_RJ[rows], a_RI = swiglu_backward(g_RI * gate_weight, h_RJ[rows], form)
        dweight = g_RI.mul_(a_RI).sum(1)
        if bias is not None:
            dweight += dout.to(accumulate) @ biases[weight_ids[slot]].to(accumulate)
        dweights[assignment] = dweight
        wa_RI[rows] = a_RI.mul_(gate_weight)
    return dh_RJ, wa_RI, dweights.view(schedule.position_of.shape)


def grad_weight(
    left: torch.Tensor,
    right: torch.Tensor,
    schedule: Schedule,
    grad: torch.Tensor,
    *,
    gather_left: bool = False,
    gather_right: bool = False,
    replica_grad: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    accumulate: bool = True,
) -> None:
    """`grad[w] += sum over the slots s of weight w, in slot order, of left[rows of s]^T @ right[rows of s]`, in place.

    Args:
        left, right: `[rows, N]` and `[rows, D]` rows in slot order, or `[T, ...]` tokens with the `gather_` flag.
        grad: `[E, N, D]`, fp32 where it accumulates. `replica_grad` `[S, N, D]` likewise.
        accumulate: False overwrites both buffers, in any dtype, and zeroes the weights that no row uses.

    Sums over slots are in fp32. Where the CPU multiplies bf16 or fp16 well, the product of one slot is rounded to that
    dtype first: those matmuls have no fp32 output, and fp32 matmuls take 2.2 times as long.
    """
    check_operands(left, schedule.num_tokens if gather_left else schedule.num_rows)
    check_operands(right, schedule.num_tokens if gather_right else schedule.num_rows)
    operand = operand_dtype(left)
    grads = _Store(grad, replica_grad)
    weight_ids = slot_weights(schedule, weight_of_slot)
    slots_of_weight: dict[int, list[slice]] = {}
    for slot, rows in filled_slots(schedule, None if operand == left.dtype else CHUNK_ROWS):
        slots_of_weight.setdefault(weight_ids[slot], []).append(rows)
    if not accumulate:
        for unused in set(range(len(grads))) - slots_of_weight.keys():
            grads[unused].zero_()
    for weight_id, slots in slots_of_weight.items():
        target = grads[weight_id]
        total = target
        if not accumulate and len(slots) > 1:
            total = target.new_zeros(target.shape, dtype=torch.promote_types(target.dtype, torch.float32))
        for rows in slots:
            left_rows = _rows(left, rows, schedule, gather_left, operand).t()
            right_rows = _rows(right, rows, schedule, gather_right, operand)
            if not accumulate and len(slots) == 1 and target.dtype == operand:
                torch.mm(left_rows, right_rows, out=target)
            elif not accumulate and len(slots) == 1:
                target.copy_(left_rows @ right_rows)
            elif total.dtype == operand:
                total.addmm_(left_rows, right_rows)
            else:
                total.add_(left_rows @ right_rows)
        if total is not target:
            target.copy_(total)


def grad_bias(
    rows_RN: torch.Tensor,
    schedule: Schedule,
    grad: torch.Tensor,
    *,
    weights_TK: torch.Tensor | None = None,
    gather: bool = False,
    replica_grad: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    accumulate: bool = True,
) -> None:
    """`grad[w] += sum over the rows r of w's slots of weight(r) * rows[r]`, `[E, N]`; flags as in `grad_weight`."""
    grads = _Store(grad, replica_grad)
    weight_ids = slot_weights(schedule, weight_of_slot)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    totals: dict[int, torch.Tensor] = {}
    for slot, rows in filled_slots(schedule, CHUNK_ROWS):
        values = _rows(rows_RN, rows, schedule, gather, dtype)
        if weights_TK is None:
            total = values.sum(0)
        else:
            total = weights_TK.reshape(-1)[schedule.assignment_of[rows]].to(dtype) @ values
        weight_id = weight_ids[slot]
        totals[weight_id] = totals[weight_id] + total if weight_id in totals else total
    if not accumulate:
        for weight_id in range(len(grads)):
            grads[weight_id].zero_()
    for weight_id, total in totals.items():
        grads[weight_id].add_(total)


def filled_slots(schedule: Schedule, most_rows: int | None = None) -> Iterator[tuple[int, slice]]:
    """(slot, its rows) of every slot that has rows, in slot order, in equal pieces of at most `most_rows`."""
    offsets = schedule.slot_offsets.tolist()
    for slot, (start, stop) in enumerate(pairwise(offsets)):
        pieces = -(-(stop - start) // most_rows) if most_rows else min(stop - start, 1)
        for piece in range(pieces):
            first, last = (start + (stop - start) * edge // pieces for edge in (piece, piece + 1))
            yield slot, slice(first, last)


def slot_weights(schedule: Schedule, weight_of_slot: torch.Tensor | None) -> list[int]:
    """Index into the two stores for every slot."""
    return list(range(schedule.num_slots)) if weight_of_slot is None else weight_of_slot.tolist()


class _Store:
    """Home tensors and then those of the replica buffer, under one index; cast to `dtype`, the last one remembered."""

    def __init__(
        self, home: torch.Tensor | None, replica: torch.Tensor | None, dtype: torch.dtype | None = None
    ) -> None:
        self._home, self._replica, self._dtype = home, replica, dtype
        self._last: tuple[int, torch.Tensor] | None = None

    def __bool__(self) -> bool:
        return self._home is not None

    def __len__(self) -> int:
        return sum(len(store) for store in (self._home, self._replica) if store is not None)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._last is None or self._last[0] != index:
            self._last = index, self._stored(index).to(self._dtype)
        return self._last[1]

    def _stored(self, index: int) -> torch.Tensor:
        assert self._home is not None
        if index < len(self._home):
            return self._home[index]
        assert self._replica is not None
        return self._replica[index - len(self._home)]


def _product(a: torch.Tensor, b: torch.Tensor, biases: _Store, weight_id: int, out: torch.Tensor) -> torch.Tensor:
    """`a @ b (+ bias)` into `out`, rounded to its dtype; returned as it was computed."""
    same = out if out.dtype == a.dtype else None
    product = torch.addmm(biases[weight_id], a, b, out=same) if biases else torch.mm(a, b, out=same)
    if same is None:
        out.copy_(product)
    return product


def _rows(source: torch.Tensor, rows: slice, schedule: Schedule, gather: bool, dtype: torch.dtype) -> torch.Tensor:
    taken = source.index_select(0, schedule.assignment_of[rows] // schedule.top_k) if gather else source[rows]
    return taken.to(dtype)
