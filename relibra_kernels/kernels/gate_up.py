# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""`h = gather(x) @ gate_up` and `a = act(h)` in one pass: the activation works on the accumulators.

A tile multiplies its rows with 2*BLOCK_N columns at once: BLOCK_N gate columns and the up columns that go with them,
which are loaded side by side where the weights are `[gate; up]`. The accumulator is taken apart at the end. Without a
gate they are 2*BLOCK_N up columns.
"""

import torch
import triton
import triton.language as tl

from ..configs.config import GemmConfig
from ..form import ExpertForm
from ..operands import check_operands
from ..schedule import Schedule
from .activations import activate, activate_alone
from .constants import ceil_div, chosen_config, flat_slots, gemm_constants, grid_of, row_tiles, stores_in_halves
from .launch import TABLES, launch
from .stores import two_stores
from .swiglu import form_constants
from .tiles import (
    bias_row,
    contract,
    count_tiles,
    describe_rows,
    describe_weights,
    first_program,
    store_tile,
    tile_of,
    weight_of,
    weight_store,
)


@triton.jit(
    do_not_specialize=["num_tiles", "num_slots", "num_tokens", "num_home", "home_first", "replica_first", "count"],
    do_not_specialize_on_alignment=TABLES,
)
def _gate_up_kernel(
    x_ptr,
    base_ptr,
    other_ptr,
    bias_ptr,
    replica_bias_ptr,
    h_ptr,
    a_ptr,
    tiles_ptr,
    slot_offsets_ptr,
    weight_of_slot_ptr,
    assignment_of_ptr,
    num_tiles,
    num_slots,
    num_tokens,
    num_home,
    home_first,
    replica_first,
    count,
    I: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    GATED: tl.constexpr,
    CONCATENATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    FAST: tl.constexpr,
    A_MODE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    XCDS: tl.constexpr,
    FLAT_SLOTS: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    WIDE: tl.constexpr = 2 * BLOCK_N
    PAIRED: tl.constexpr = GATED and CONCATENATED
    WIDTH: tl.constexpr = 2 * I if GATED else I  # of h
    NUM_N: tl.constexpr = (WIDTH + WIDE - 1) // WIDE
    # concatenated: I columns that come in pairs; interleaved: 2*I columns; without a gate: I columns
    N: tl.constexpr = I if PAIRED else WIDTH
    BLOCK: tl.constexpr = BLOCK_N if PAIRED else WIDE
    rows_of = describe_rows(x_ptr, num_tokens, D, A_MODE, BLOCK_M, BLOCK_K)
    described = describe_weights(base_ptr, count, N, D, ROWS_ARE_N, PAIRED, TMA, BLOCK, BLOCK_K)
    FLAT: tl.constexpr = FLAT_SLOTS > 0
    if FLAT:
        num_tiles = count_tiles(slot_offsets_ptr, num_slots, FLAT_SLOTS, BLOCK_M)
    for index in tl.range(first_program(XCDS), num_tiles * NUM_N, tl.num_programs(0), flatten=FLAT):
        m, n = tile_of(index, num_tiles, NUM_N, GROUP_M)
        slot = tl.load(tiles_ptr + 2 * m)
        if FLAT or slot >= 0:  # padding has no slot; a loop with a condition cannot be flattened
            row0 = tl.load(tiles_ptr + 2 * m + 1)
            end = tl.load(slot_offsets_ptr + slot + 1)
            weight = weight_of(slot, weight_of_slot_ptr)
            row_R = row0 + tl.arange(0, BLOCK_M)
            token_R = tl.load(assignment_of_ptr + tl.minimum(row_R, end - 1)) // TOP_K
            n0 = n * BLOCK_N
            weights, number = weight_store(
                described, base_ptr, other_ptr, weight, num_home, home_first, replica_first,
                N, D, ROWS_ARE_N, PAIRED, TMA, BLOCK, BLOCK_K,
            )  # fmt: skip
            column = n0 + tl.arange(0, BLOCK_N)
            inside = column < I
            stored_R = row_R < end
            # a 64-bit start and 32-bit offsets inside the tile: registers
            row_of_tile = tl.arange(0, BLOCK_M)[:, None]
            h_tile = h_ptr + row0.to(tl.int64) * WIDTH
            a_tile = a_ptr + row0.to(tl.int64) * I
            first: tl.constexpr = 1 if PAIRED else 2
            both = contract(
                rows_of, row0, token_R, weights, number, first * n0,
                N, D, ROWS_ARE_N, PAIRED, A_MODE, TMA, PRECISION, UPCAST, BLOCK_M, BLOCK, BLOCK_K,
            )  # fmt: skip
            if PAIRED:
                gate, up = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
                if bias_ptr is not None:
                    gate += bias_row(bias_ptr, replica_bias_ptr, weight, num_home, column, inside, 2 * I, XCDS)
                    up += bias_row(bias_ptr, replica_bias_ptr, weight, num_home, I + column, inside, 2 * I, XCDS)
                mask = stored_R[:, None] & inside[None, :]
                h_at = row_of_tile * (2 * I) + column[None, :]
                tl.store(h_tile + h_at, gate.to(h_ptr.dtype.element_ty), mask=mask)
                tl.store(h_tile + I + h_at, up.to(h_ptr.dtype.element_ty), mask=mask)
            else:
                wide = 2 * n0 + tl.arange(0, WIDE)
                if bias_ptr is not None:
                    both += bias_row(bias_ptr, replica_bias_ptr, weight, num_home, wide, wide < WIDTH, WIDTH, XCDS)
                if GATED:
                    store_tile(both, h_tile, 2 * n0, stored_R, WIDTH, HALVES, BLOCK_M, WIDE)
                    gate, up = both.reshape(BLOCK_M, BLOCK_N, 2).split()
                elif BLOCK_M < 128:
                    _store_alone(both, h_tile, a_tile, stored_R, 2 * n0, I, ACTIVATION, BLOCK_M, WIDE)
                else:  # halves of large tiles, for which Triton 3.9 spills 8 bytes on sm_100; 3.7 does for small ones
                    left, right = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
                    _store_alone(left, h_tile, a_tile, stored_R, 2 * n0, I, ACTIVATION, BLOCK_M, BLOCK_N)
                    _store_alone(right, h_tile, a_tile, stored_R, 2 * n0 + BLOCK_N, I, ACTIVATION, BLOCK_M, BLOCK_N)
            if GATED:
                # from h as it is stored, which is what backward sees
                gate = gate.to(h_ptr.dtype.element_ty).to(tl.float32)
                up = up.to(h_ptr.dtype.element_ty).to(tl.float32)
                a = activate(gate, up, ACTIVATION, LIMIT, ALPHA, FAST)
                a_at = row_of_tile * I + column[None, :]
                tl.store(a_tile + a_at, a.to(a_ptr.dtype.element_ty), mask=stored_R[:, None] & inside[None, :])


@triton.jit
def _store_alone(
    h,
    h_tile,
    a_tile,
    stored_R,
    column0,
    I: tl.constexpr,  # noqa: E741
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h and a of BLOCK_N columns from `column0` on, without a gate."""
    column = column0 + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_M)[:, None] * I + column[None, :]
    mask = stored_R[:, None] & (column < I)[None, :]
    h = h.to(h_tile.dtype.element_ty)
    tl.store(h_tile + at, h, mask=mask)
    tl.store(a_tile + at, activate_alone(h.to(tl.float32), ACTIVATION).to(a_tile.dtype.element_ty), mask=mask)


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
    config: GemmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = gather(x) @ gate_up (+ bias)`, `a = swiglu(h)`: `([rows, 2I], [rows, I])`; both `[rows, I]` without gate."""
    width, hidden_size = gate_up.shape[2 if form.is_transposed else 1], x_TH.shape[1]
    intermediate_size, pairs = form.intermediate_size(width), ceil_div(width, 2)
    check_operands(x_TH, schedule.num_tokens, gate_up, replica_gate_up, bias, replica_bias)
    config = config or chosen_config(
        "gate_up",
        x_TH,
        schedule,
        (pairs, hidden_size),
        layout=not form.is_transposed,
        interleaved=not form.is_concatenated,
    )
    h_RJ, a_RI = (
        x_TH.new_empty(schedule.num_rows, width),
        x_TH.new_empty(schedule.num_rows, intermediate_size),
    )
    tiles = row_tiles(schedule, config.block_m)
    num_tiles = tiles.shape[0]
    if not schedule.num_rows:
        return h_RJ, a_RI
    stores = two_stores(gate_up, replica_gate_up)
    launch(
        _gate_up_kernel,
        grid_of(x_TH, num_tiles * ceil_div(pairs, config.block_n), config),
        x_TH,
        stores.base,
        stores.other,
        bias,
        replica_bias,
        h_RJ,
        a_RI,
        tiles,
        schedule.slot_offsets,
        weight_of_slot,
        schedule.assignment_of,
        num_tiles,
        schedule.num_slots,
        x_TH.shape[0],
        gate_up.shape[0],
        *stores.arguments,
        I=intermediate_size,
        D=hidden_size,
        TOP_K=schedule.top_k,
        ROWS_ARE_N=not form.is_transposed,
        GROUP_M=config.group_m,
        **form_constants(form, x_TH),
        **gemm_constants(
            x_TH,
            config,
            widths=(hidden_size, width),
            described=(x_TH, gate_up, replica_gate_up),
            gathered_depth=hidden_size,
        ),
        HALVES=stores_in_halves(x_TH),
        # interleaved, Triton 3.9 spills 16 bytes
        FLAT_SLOTS=flat_slots(x_TH, schedule, stores) if form.is_concatenated else 0,
    )
    return h_RJ, a_RI
