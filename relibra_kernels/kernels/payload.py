# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""Payload rows (`relibra_kernels.payload`): packed by one program a token, so that a hidden state is read once.

A row of a payload holds a hidden state, slots and gate weights. The kernels get one pointer of the right type for each
of the three, all into the same bytes, and the length of a row in elements of that type.
"""

import functools

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig
from ..payload import PayloadLayout, check_payload, check_sent, check_tokens, layout_of
from ..schedule import Schedule
from .constants import block_of, chosen_block, next_power_of_2
from .launch import TABLES, launch


@triton.jit
def _at(values, k, LANES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LANES) == k, values, 0), 0)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _pack_payload_kernel(
    x_ptr,
    weights_ptr,
    slot_ptr,
    position_ptr,
    hidden_out_ptr,
    slots_out_ptr,
    weights_out_ptr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS_AT: tl.constexpr,
    SLOTS_ROW: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    WEIGHTS_ROW: tl.constexpr,
    ROW: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token into all of its rows; all lengths in elements."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < TOP_K
    rows = tl.load(position_ptr + token * TOP_K + lane, mask=real, other=-1)
    weights = tl.load(weights_ptr + token * TOP_K + lane, mask=real, other=0.0)
    for k in tl.static_range(TOP_K):
        row = _at(rows, k, LANES).to(tl.int64)
        here = real & (row >= 0)
        slots = tl.load(slot_ptr + row * TOP_K + lane, mask=here, other=-1)
        tl.store(slots_out_ptr + row * SLOTS_ROW + SLOTS_AT + lane, slots, mask=here)
        to = weights_out_ptr + row * WEIGHTS_ROW + WEIGHTS_AT + lane
        tl.store(to, weights.to(weights_out_ptr.dtype.element_ty), mask=here)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        x = tl.load(x_ptr + token * H + column, mask=inside, other=0.0)
        for k in tl.static_range(TOP_K):
            row = _at(rows, k, LANES).to(tl.int64)
            tl.store(hidden_out_ptr + row * ROW + column, x, mask=inside & (row >= 0))


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _copy_payload_kernel(
    hidden_ptr,
    slots_ptr,
    weights_ptr,
    hidden_out_ptr,
    slots_out_ptr,
    weights_out_ptr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    ROW_IN: tl.constexpr,
    ROW_OUT: tl.constexpr,
    SLOTS_AT: tl.constexpr,
    WEIGHTS_IN: tl.constexpr,
    WEIGHTS_ROW_IN: tl.constexpr,
    WEIGHTS_OUT: tl.constexpr,
    WEIGHTS_ROW_OUT: tl.constexpr,
    SLOTS_ROW: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row from a payload into tensors of its parts, or back; all lengths in elements. No slots on the way back."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < TOP_K
    weights = tl.load(weights_ptr + row * WEIGHTS_ROW_IN + WEIGHTS_IN + lane, mask=real, other=0.0)
    tl.store(weights_out_ptr + row * WEIGHTS_ROW_OUT + WEIGHTS_OUT + lane, weights, mask=real)
    if slots_ptr is not None:
        slots = tl.load(slots_ptr + row * SLOTS_ROW + SLOTS_AT + lane, mask=real, other=-1)
        tl.store(slots_out_ptr + row * TOP_K + lane, slots, mask=real)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        x = tl.load(hidden_ptr + row * ROW_IN + column, mask=inside, other=0.0)
        tl.store(hidden_out_ptr + row * ROW_OUT + column, x, mask=inside)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _unpack_gradients_kernel(
    hidden_ptr,
    weights_in_ptr,
    position_ptr,
    dx_ptr,
    dweights_ptr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    WEIGHTS_ROW: tl.constexpr,
    ROW: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token: its rows and their gate gradients, added up in fp32 in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < TOP_K
    rows = tl.load(position_ptr + token * TOP_K + lane, mask=real, other=-1)
    dweights = tl.zeros([LANES], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = _at(rows, k, LANES).to(tl.int64)
        at = weights_in_ptr + row * WEIGHTS_ROW + WEIGHTS_AT + lane
        dweights += tl.load(at, mask=real & (row >= 0), other=0.0).to(tl.float32)
    tl.store(dweights_ptr + token * TOP_K + lane, dweights.to(dweights_ptr.dtype.element_ty), mask=real)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            row = _at(rows, k, LANES).to(tl.int64)
            dx = tl.load(hidden_ptr + row * ROW + column, mask=inside & (row >= 0), other=0.0)
            total += dx.to(tl.float32)
        tl.store(dx_ptr + token * H + column, total.to(dx_ptr.dtype.element_ty), mask=inside)


def pack_payload(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    slots_NK: torch.Tensor,
    send: Schedule,
    out: torch.Tensor,
    *,
    config: BlockConfig | None = None,
) -> None:
    """Write payload rows of tokens on their way to other ranks: see the reference."""
    check_tokens(x_TH, weights_TK)
    check_sent(weights_TK, slots_NK, send)
    layout = layout_of(x_TH, weights_TK)
    check_payload(out, layout, send.num_rows)
    views = out.view(layout.dtype), out.view(torch.int16), out.view(layout.weights_dtype)
    how = _constants_of_tokens(layout, config or _chosen(layout, x_TH, "pack"), has_slots=True)
    launch(_pack_payload_kernel, (len(x_TH),), x_TH, weights_TK, slots_NK, send.position_of, *views, **how)


def unpack_payload(payload: torch.Tensor, layout: PayloadLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(x [rows, H], weights [rows, K], slots int16 [rows, K])` of received rows, contiguous."""
    check_payload(payload, layout)
    rows = len(payload)
    x_RH = torch.empty(rows, layout.hidden_size, dtype=layout.dtype, device=payload.device)
    weights_RK = torch.empty(rows, layout.top_k, dtype=layout.weights_dtype, device=payload.device)
    slots_RK = torch.empty(rows, layout.top_k, dtype=torch.int16, device=payload.device)
    _copy(layout, (payload, payload, payload), (x_RH, slots_RK, weights_RK), rows, unpack=True)
    return x_RH, weights_RK, slots_RK


def pack_gradients(dx_RH: torch.Tensor, dweights_RK: torch.Tensor, out: torch.Tensor) -> None:
    """Write payload rows on their way back: a received row's gradient and those of its gate weights."""
    check_tokens(dx_RH, dweights_RK)
    layout = PayloadLayout(dx_RH.shape[1], dweights_RK.shape[1], dx_RH.dtype, dweights_RK.dtype, has_slots=False)
    check_payload(out, layout, len(dx_RH))
    _copy(layout, (dx_RH, None, dweights_RK), (out, None, out), len(dx_RH), unpack=False)


def unpack_gradients(
    payload: torch.Tensor, send: Schedule, layout: PayloadLayout, *, weights_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dx [T, H], dweights [T, K])`: a token's rows are added up in fp32, in the order of k."""
    check_payload(payload, layout, send.num_rows)
    tokens = send.num_tokens
    dx_TH = torch.empty(tokens, layout.hidden_size, dtype=layout.dtype, device=payload.device)
    weights_dtype = weights_dtype or layout.weights_dtype
    dweights_TK = torch.empty(tokens, layout.top_k, dtype=weights_dtype, device=payload.device)
    views = payload.view(layout.dtype), payload.view(layout.weights_dtype)
    how = _constants_of_tokens(layout, _chosen(layout, dx_TH, "unpermute"), has_slots=False)
    launch(_unpack_gradients_kernel, (tokens,), *views, send.position_of, dx_TH, dweights_TK, **how)
    return dx_TH, dweights_TK


def _copy(layout: PayloadLayout, sources: tuple, targets: tuple, rows: int, *, unpack: bool) -> None:
    """Rows of a payload into the parts' own tensors, or of those into a payload."""
    types = layout.dtype, torch.int16, layout.weights_dtype

    def typed(part, dtype):
        return part.view(dtype) if part is not None and part.dtype == torch.uint8 else part

    views = [typed(part, dtype) for part, dtype in zip((*sources, *targets), types * 2, strict=True)]
    hidden = targets[0] if unpack else sources[0]
    launch(_copy_payload_kernel, (rows,), *views, **_constants_of_rows(layout, _chosen(layout, hidden, "pack"), unpack))


def _chosen(layout: PayloadLayout, hidden: torch.Tensor, part: str) -> BlockConfig:
    """How hidden states are walked: as that part of permute says. What copies or adds rows up walks them likewise."""
    return chosen_block("permute", hidden, layout.hidden_size, len(hidden), part=part)


def _constants(layout: PayloadLayout, config: BlockConfig) -> dict[str, int]:
    block, warps = block_of(config, layout.hidden_size, layout.dtype.itemsize)
    lanes = next_power_of_2(layout.top_k)
    return {"H": layout.hidden_size, "TOP_K": layout.top_k, "LANES": lanes, "BLOCK_H": block, "num_warps": warps}


def _places(layout: PayloadLayout) -> dict[str, int]:
    """Lengths of a row and where its weights are, in elements."""
    size = layout.weights_dtype.itemsize
    row = layout.row_bytes
    return {"ROW": row // layout.dtype.itemsize, "WEIGHTS_AT": layout.weights_at // size, "WEIGHTS_ROW": row // size}


def _slots(layout: PayloadLayout) -> dict[str, int]:
    return {"SLOTS_AT": layout.slots_at // 2, "SLOTS_ROW": layout.row_bytes // 2}


@functools.cache
def _constants_of_tokens(layout: PayloadLayout, config: BlockConfig, *, has_slots: bool) -> dict[str, int]:
    """Where a program has a token and its rows."""
    return {**_constants(layout, config), **_places(layout), **(_slots(layout) if has_slots else {})}


@functools.cache
def _constants_of_rows(layout: PayloadLayout, config: BlockConfig, unpack: bool) -> dict[str, int]:
    """Where a program has a row, of a payload and of the parts' own tensors."""
    packed = _places(layout)
    plain = {"ROW": layout.hidden_size, "WEIGHTS_AT": 0, "WEIGHTS_ROW": layout.top_k}
    source, target = (packed, plain) if unpack else (plain, packed)
    return {
        **_constants(layout, config),
        **_slots(layout),
        "ROW_IN": source["ROW"],
        "ROW_OUT": target["ROW"],
        "WEIGHTS_IN": source["WEIGHTS_AT"],
        "WEIGHTS_OUT": target["WEIGHTS_AT"],
        "WEIGHTS_ROW_IN": source["WEIGHTS_ROW"],
        "WEIGHTS_ROW_OUT": target["WEIGHTS_ROW"],
    }
