# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""`out[r] = a[r] @ W[slot of r]`: ragged in rows, two stores of weights, also backwards (dX) with the other layout.

Persistent programs walk the (row tile, column tile) pairs; a tile lies in one slot, padding tiles cost one load.
Contiguous operands come by TMA descriptors where the device has them, gathered rows by pointers or descriptor gather.
"""

import torch
import triton
import triton.language as tl

from ..configs.config import GemmConfig
from ..operands import check_operands
from ..schedule import Schedule
from .constants import ceil_div, chosen_config, flat_slots, gemm_constants, grid_of, row_tiles, stores_in_halves
from .launch import TABLES, launch
from .stores import two_stores
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
    do_not_specialize=["num_tiles", "num_slots", "num_a_rows", "num_home", "home_first", "replica_first", "count"],
    do_not_specialize_on_alignment=TABLES,
)
def _grouped_gemm_kernel(
    a_ptr,
    base_ptr,
    other_ptr,
    bias_ptr,
    replica_bias_ptr,
    out_ptr,
    tiles_ptr,
    slot_offsets_ptr,
    weight_of_slot_ptr,
    assignment_of_ptr,
    num_tiles,
    num_slots,
    num_a_rows,
    num_home,
    home_first,
    replica_first,
    count,
    N: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    A_MODE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    XCDS: tl.constexpr,
    FLAT_SLOTS: tl.constexpr,
    HALVES: tl.constexpr,
    SPECIALISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows_of = describe_rows(a_ptr, num_a_rows, D, A_MODE, BLOCK_M, BLOCK_K)
    described = describe_weights(base_ptr, count, N, D, ROWS_ARE_N, False, TMA, BLOCK_N, BLOCK_K)
    FLAT: tl.constexpr = FLAT_SLOTS > 0
    if FLAT:
        num_tiles = count_tiles(slot_offsets_ptr, num_slots, FLAT_SLOTS, BLOCK_M)
    for index in tl.range(
        first_program(XCDS), num_tiles * NUM_N, tl.num_programs(0), flatten=FLAT, warp_specialize=SPECIALISED
    ):
        m, n = tile_of(index, num_tiles, NUM_N, GROUP_M)
        slot = tl.load(tiles_ptr + 2 * m)
        if FLAT or slot >= 0:  # padding has no slot; a loop with a condition cannot be flattened
            row0 = tl.load(tiles_ptr + 2 * m + 1)
            end = tl.load(slot_offsets_ptr + slot + 1)
            weight = weight_of(slot, weight_of_slot_ptr)
            row_R = row0 + tl.arange(0, BLOCK_M)
            source_R = tl.minimum(row_R, end - 1)
            if TOP_K > 0:
                source_R = tl.load(assignment_of_ptr + source_R) // TOP_K
            n0 = n * BLOCK_N
            weights, number = weight_store(
                described, base_ptr, other_ptr, weight, num_home, home_first, replica_first,
                N, D, ROWS_ARE_N, False, TMA, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = contract(
                rows_of, row0, source_R, weights, number, n0,
                N, D, ROWS_ARE_N, False, A_MODE, TMA, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            column = n0 + tl.arange(0, BLOCK_N)
            inside = column < N
            if bias_ptr is not None:
                acc += bias_row(bias_ptr, replica_bias_ptr, weight, num_home, column, inside, N, XCDS)
            # a 64-bit start and 32-bit offsets inside the tile: registers
            out_tile = out_ptr + row0.to(tl.int64) * N
            store_tile(acc, out_tile, n0, row_R < end, N, HALVES, BLOCK_M, BLOCK_N)


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
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`out[r] = a[r] @ W[slot of r] (+ bias)`, `[rows, N]`; rows of the unused tail are undefined.

    Args:
        a: `[rows, D]` rows in slot order, or `[T, D]` tokens with `gather`.
        weight: `[E, D, N]`, or `[E, N, D]` with `transpose_weight`.
        config: tile sizes; None looks them up.
    """
    n, d = (weight.shape[1], weight.shape[2]) if transpose_weight else (weight.shape[2], weight.shape[1])
    count = schedule.num_tokens if gather else schedule.num_rows
    check_operands(a, count, weight, replica_weight, bias, replica_bias)
    config = config or chosen_config("grouped_gemm", a, schedule, (n, d), layout=transpose_weight)
    out = a.new_empty(schedule.num_rows, n)
    tiles = row_tiles(schedule, config.block_m)
    num_tiles = tiles.shape[0]
    if not schedule.num_rows:
        return out
    stores = two_stores(weight, replica_weight)
    described = (a, weight, replica_weight)
    constants = gemm_constants(a, config, widths=(n, d), described=described, gathered_depth=d if gather else 0)
    # only where all operands come by descriptors that are made once
    is_specialised = config.is_specialised and constants["A_MODE"] == "tma" and stores.other is None
    launch(
        _grouped_gemm_kernel,
        grid_of(a, num_tiles * ceil_div(n, config.block_n), config),
        a,
        stores.base,
        stores.other,
        bias,
        replica_bias,
        out,
        tiles,
        schedule.slot_offsets,
        weight_of_slot,
        schedule.assignment_of,
        num_tiles,
        schedule.num_slots,
        a.shape[0],
        weight.shape[0],
        *stores.arguments,
        N=n,
        D=d,
        TOP_K=schedule.top_k if gather else 0,
        ROWS_ARE_N=transpose_weight,
        GROUP_M=config.group_m,
        FLAT_SLOTS=flat_slots(a, schedule, stores, is_specialised=is_specialised),
        SPECIALISED=is_specialised,
        HALVES=is_specialised or stores_in_halves(a),
        **constants,
    )
    return out
