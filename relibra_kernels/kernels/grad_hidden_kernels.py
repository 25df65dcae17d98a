# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""The kernels of `grad_hidden.py`: the product with downᵀ, then the sum of its partials.

`_grad_hidden_kernel` computes tiles of `g = dout @ downᵀ`; `grad_hidden_epilogue.py` makes dh, w*a and a part of
`<g, a>` of each. `_dweights_kernel` adds a token's parts in order, and where there is a bias `<dout, bias>`.
"""

import triton
import triton.language as tl

from .grad_hidden_epilogue import finish_tile
from .launch import TABLES
from .tiles import (
    contract,
    count_tiles,
    describe_rows,
    describe_weights,
    first_program,
    tile_of,
    weight_of,
    weight_store,
)


@triton.jit
def _tile(
    rows_of,
    described,
    base_ptr,
    other_ptr,
    h_ptr,
    dh_ptr,
    wa_ptr,
    weight,
    num_home,
    home_first,
    replica_first,
    token_R,
    w_R,
    row0,
    end,
    n0,
    I: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
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
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dh and w*a of one tile, and its part of `<g, a>`."""
    weights, number = weight_store(
        described, base_ptr, other_ptr, weight, num_home, home_first, replica_first,
        I, D, ROWS_ARE_N, False, TMA, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    g = contract(
        rows_of, row0, token_R, weights, number, n0,
        I, D, ROWS_ARE_N, False, A_MODE, TMA, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    return finish_tile(
        g, w_R, h_ptr, dh_ptr, wa_ptr, row0, end, n0,
        I, GATED, CONCATENATED, ACTIVATION, LIMIT, ALPHA, FAST, WIDTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_tiles",
        "num_slots",
        "num_tokens",
        "num_home",
        "home_first",
        "replica_first",
        "count",
        "num_rows",
    ],
    do_not_specialize_on_alignment=TABLES,
)
def _grad_hidden_kernel(
    dout_ptr,
    base_ptr,
    other_ptr,
    h_ptr,
    weights_ptr,
    dh_ptr,
    wa_ptr,
    partials_ptr,
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
    num_rows,
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
    WIDTH: tl.constexpr,
    HALF_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    NUM_N: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    rows_of = describe_rows(dout_ptr, num_tokens, D, A_MODE, BLOCK_M, BLOCK_K)
    described = describe_weights(base_ptr, count, I, D, ROWS_ARE_N, False, TMA, BLOCK_N, BLOCK_K)
    if HALF_LAST:
        half_described = describe_weights(base_ptr, count, I, D, ROWS_ARE_N, False, TMA, BLOCK_N // 2, BLOCK_K)
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
            assignment_R = tl.load(assignment_of_ptr + tl.minimum(row_R, end - 1))
            w_R = tl.load(weights_ptr + assignment_R).to(tl.float32)
            n0 = n * BLOCK_N
            if HALF_LAST and n == NUM_N - 1:
                partial_R = _tile(
                    rows_of, half_described, base_ptr, other_ptr, h_ptr, dh_ptr, wa_ptr, weight, num_home,
                    home_first, replica_first, assignment_R // TOP_K, w_R, row0, end, n0,
                    I, D, ROWS_ARE_N, GATED, CONCATENATED, ACTIVATION, LIMIT, ALPHA, FAST, A_MODE, TMA,
                    PRECISION, UPCAST, WIDTH, BLOCK_M, BLOCK_N // 2, BLOCK_K,
                )  # fmt: skip
            else:
                partial_R = _tile(
                    rows_of, described, base_ptr, other_ptr, h_ptr, dh_ptr, wa_ptr, weight, num_home,
                    home_first, replica_first, assignment_R // TOP_K, w_R, row0, end, n0,
                    I, D, ROWS_ARE_N, GATED, CONCATENATED, ACTIVATION, LIMIT, ALPHA, FAST, A_MODE, TMA,
                    PRECISION, UPCAST, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            tl.store(partials_ptr + n.to(tl.int64) * num_rows + row_R, partial_R, mask=row_R < end)


@triton.jit(do_not_specialize=["num_rows", "num_home"], do_not_specialize_on_alignment=TABLES)
def _dweights_kernel(
    partials_ptr,
    dout_ptr,
    bias_ptr,
    replica_bias_ptr,
    position_ptr,
    slot_offsets_ptr,
    weight_of_slot_ptr,
    dweights_ptr,
    num_rows,
    num_home,
    NUM_PARTIALS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token: its partials in order, and where there is a bias `<dout, bias of the assignment's expert>`."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    real = lane < TOP_K
    row = tl.load(position_ptr + token * TOP_K + lane, mask=real, other=-1)
    used = row >= 0
    total = tl.zeros([LANES], dtype=tl.float32)
    for n in range(0, NUM_PARTIALS):
        total += tl.load(partials_ptr + tl.cast(n, tl.int64) * num_rows + row, mask=used, other=0.0)
    if bias_ptr is not None:
        low = tl.zeros([LANES], dtype=tl.int32)
        high = tl.full([LANES], NUM_SLOTS, dtype=tl.int32)
        for _ in tl.static_range(SEARCH_STEPS):  # the slot whose rows contain this one
            middle = (low + high) // 2
            beyond = tl.load(slot_offsets_ptr + middle) > row
            high = tl.where(beyond, middle, high)
            low = tl.where(beyond, low, middle)
        weight = low
        if weight_of_slot_ptr is not None:
            weight = tl.load(weight_of_slot_ptr + low, mask=used, other=0)
        at = weight.to(tl.int64) * H
        at_home = used
        if replica_bias_ptr is not None:
            at_home = used & (weight < num_home)
            at_replica = (weight - num_home).to(tl.int64) * H
        for first in range(0, H, BLOCK_H):
            column = first + tl.arange(0, BLOCK_H)
            inside = column < H
            dout = tl.load(dout_ptr + token * H + column, mask=inside, other=0.0).to(tl.float32)
            here = at_home[:, None] & inside[None, :]
            bias = tl.load(bias_ptr + (at[:, None] + column[None, :]), mask=here, other=0.0)
            # a load of each store: Triton 3.7 fails on a choice between their pointers for gfx942
            if replica_bias_ptr is not None:
                here = (used & ~at_home)[:, None] & inside[None, :]
                bias += tl.load(replica_bias_ptr + (at_replica[:, None] + column[None, :]), mask=here, other=0.0)
            total += tl.sum(dout[None, :] * bias.to(tl.float32), 1)
    tl.store(dweights_ptr + token * TOP_K + lane, total, mask=real)
