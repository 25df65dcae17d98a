# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""Payload rows (`relibra_kernels.payload`): packed by one program a token, so that a hidden state is read once.

The bytes of a payload are seen through three pointers of its parts' types, with the row's length in each.
"""

import torch
import triton
import triton.language as tl

from ..payload import PayloadLayout, check_payload, check_tables, check_tokens
from .constants import block_of, chosen_block
from .launch import TABLES, launch


@triton.jit
def _first_rows(row_of_ptr, token, TOP_K: tl.constexpr, LANES: tl.constexpr):
    """(rows, rows that no earlier k of the token names) by k; -1 where there is none."""
    lane = tl.arange(0, LANES)
    rows = tl.load(row_of_ptr + token * TOP_K + lane, mask=lane < TOP_K, other=-1)
    earlier = (rows[None, :] == rows[:, None]) & (lane[None, :] < lane[:, None])
    return rows, tl.where(tl.sum(earlier.to(tl.int32), 1) == 0, rows, -1)


@triton.jit
def _at(values, k, LANES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, LANES) == k, values, 0), 0)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _pack_payload_kernel(
    x_ptr,
    weights_ptr,
    slot_ptr,
    row_of_ptr,
    hidden_out_ptr,
    slots_out_ptr,
    weights_out_ptr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token into all of its rows; ROW, SLOTS_AT and WEIGHTS_AT are in bytes, SIZE is an element's."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < TOP_K
    rows, first_rows = _first_rows(row_of_ptr, token, TOP_K, LANES)
    slots = tl.load(slot_ptr + token * TOP_K + lane, mask=real, other=-1)
    weights = tl.load(weights_ptr + token * TOP_K + lane, mask=real, other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        row = _at(first_rows, k, LANES).to(tl.int64)
        mine = rows == row
        here = real & (row >= 0)
        tl.store(slots_out_ptr + row * (ROW // 2) + SLOTS_AT // 2 + lane, tl.where(mine, slots, -1), mask=here)
        tl.store(weights_out_ptr + row * (ROW // 4) + WEIGHTS_AT // 4 + lane, tl.where(mine, weights, 0.0), mask=here)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        x = tl.load(x_ptr + token * H + column, mask=inside, other=0.0)
        for k in tl.static_range(TOP_K):
            row = _at(first_rows, k, LANES).to(tl.int64)
            tl.store(hidden_out_ptr + row * (ROW // SIZE) + column, x, mask=inside & (row >= 0))


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
    tl.store(weights_out_ptr + row * WEIGHTS_ROW_OUT + WEIGHTS_OUT + lane, weights.to(tl.float32), mask=real)
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
    row_of_ptr,
    dx_ptr,
    dweights_ptr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token: its rows added up in the order of k, each once, and its gate gradients."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < TOP_K
    rows, first_rows = _first_rows(row_of_ptr, token, TOP_K, LANES)
    at = weights_in_ptr + rows.to(tl.int64) * (ROW // 4) + WEIGHTS_AT // 4 + lane
    tl.store(dweights_ptr + token * TOP_K + lane, tl.load(at, mask=real & (rows >= 0), other=0.0), mask=real)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            row = _at(first_rows, k, LANES).to(tl.int64)
            dx = tl.load(hidden_ptr + row * (ROW // SIZE) + column, mask=inside & (row >= 0), other=0.0)
            total += dx.to(tl.float32)
        tl.store(dx_ptr + token * H + column, total.to(dx_ptr.dtype.element_ty), mask=inside)


def pack_payload(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, slot_TK: torch.Tensor, row_of_TK: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Payload rows of tokens on their way to other ranks, uint8 `[num_rows, row_bytes]`: see the reference."""
    check_tokens(x_TH, weights_TK, slot_TK=slot_TK, row_of_TK=row_of_TK)
    layout = PayloadLayout(x_TH.shape[1], weights_TK.shape[1], x_TH.dtype)
    payload = layout.new(num_rows, x_TH.device)
    views = payload.view(layout.dtype), payload.view(torch.int16), payload.view(torch.float32)
    how = _constants(layout, x_TH, len(x_TH), "permute")
    at = {"SLOTS_AT": layout.slots_at, "WEIGHTS_AT": layout.weights_at, "ROW": layout.row_bytes}
    size = layout.dtype.itemsize
    launch(_pack_payload_kernel, (len(x_TH),), x_TH, weights_TK, slot_TK, row_of_TK, *views, **how, **at, SIZE=size)
    return payload


def unpack_payload(payload: torch.Tensor, layout: PayloadLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(x [rows, H], slots int16 [rows, K], weights fp32 [rows, K])` of received rows, contiguous."""
    check_payload(payload, layout)
    rows = len(payload)
    x_RH = torch.empty(rows, layout.hidden_size, dtype=layout.dtype, device=payload.device)
    slot_RK = torch.empty(rows, layout.top_k, dtype=torch.int16, device=payload.device)
    weights_RK = torch.empty(rows, layout.top_k, dtype=torch.float32, device=payload.device)
    _copy(layout, (payload, payload, payload), (x_RH, slot_RK, weights_RK), rows, unpack=True)
    return x_RH, slot_RK, weights_RK


def pack_gradients(dx_RH: torch.Tensor, dweights_RK: torch.Tensor) -> torch.Tensor:
    """Payload rows on their way back: a received row's gradient and those of its gate weights; slots are undefined."""
    check_tokens(dx_RH, dweights_RK)
    layout = PayloadLayout(dx_RH.shape[1], dweights_RK.shape[1], dx_RH.dtype)
    payload = layout.new(len(dx_RH), dx_RH.device)
    _copy(layout, (dx_RH, None, dweights_RK), (payload, None, payload), len(dx_RH), unpack=False)
    return payload


def unpack_gradients(
    payload: torch.Tensor, row_of_TK: torch.Tensor, layout: PayloadLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dx [T, H], dweights fp32 [T, K])`: a token's rows are added up in fp32, in the order of k, each once."""
    check_payload(payload, layout)
    check_tables(row_of_TK=row_of_TK)
    tokens = len(row_of_TK)
    dx_TH = torch.empty(tokens, layout.hidden_size, dtype=layout.dtype, device=payload.device)
    dweights_TK = torch.empty(tokens, layout.top_k, dtype=torch.float32, device=payload.device)
    views = payload.view(layout.dtype), payload.view(torch.float32)
    how = _constants(layout, views[0], tokens, "unpermute")
    at = {"WEIGHTS_AT": layout.weights_at, "ROW": layout.row_bytes, "SIZE": layout.dtype.itemsize}
    launch(_unpack_gradients_kernel, (tokens,), *views, row_of_TK, dx_TH, dweights_TK, **how, **at)
    return dx_TH, dweights_TK


def _copy(layout: PayloadLayout, sources: tuple, targets: tuple, rows: int, *, unpack: bool) -> None:
    """Rows of a payload into the parts' own tensors, or of those into a payload."""
    types = layout.dtype, torch.int16, torch.float32

    def typed(part, dtype):
        return part.view(dtype) if part is not None and part.dtype == torch.uint8 else part

    packed = {"ROW": layout.row_bytes // layout.dtype.itemsize, "WEIGHTS": layout.weights_at // 4}
    plain = {"ROW": layout.hidden_size, "WEIGHTS": 0}
    source, target = (packed, plain) if unpack else (plain, packed)
    weights_row = layout.row_bytes // 4, layout.top_k
    views = [[typed(part, dtype) for part, dtype in zip(parts, types, strict=True)] for parts in (sources, targets)]
    launch(
        _copy_payload_kernel,
        (rows,),
        *views[0],
        *views[1],
        **_constants(layout, views[0][0], rows, "permute"),
        ROW_IN=source["ROW"],
        ROW_OUT=target["ROW"],
        SLOTS_AT=layout.slots_at // 2,
        SLOTS_ROW=layout.row_bytes // 2,
        WEIGHTS_IN=source["WEIGHTS"],
        WEIGHTS_OUT=target["WEIGHTS"],
        WEIGHTS_ROW_IN=weights_row[0 if unpack else 1],
        WEIGHTS_ROW_OUT=weights_row[1 if unpack else 0],
    )


def _constants(layout: PayloadLayout, hidden: torch.Tensor, count: int, part: str) -> dict[str, int]:
    """How hidden states are walked: as the rows of that part of permute are."""
    config = chosen_block("permute", hidden, layout.hidden_size, count, part=part)
    block, warps = block_of(config, layout.hidden_size, layout.dtype.itemsize)
    lanes = triton.next_power_of_2(layout.top_k)
    return {"H": layout.hidden_size, "TOP_K": layout.top_k, "LANES": lanes, "BLOCK_H": block, "num_warps": warps}
