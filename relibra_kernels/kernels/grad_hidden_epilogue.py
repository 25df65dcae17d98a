# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""What `grad_hidden` makes of a tile of `g = dout @ downᵀ`: the derivative of the activation, from the saved h."""

import triton
import triton.language as tl

from .activations import derivative_alone, derivatives


@triton.jit
def finish_tile(
    g,
    w_R,
    h_ptr,
    dh_ptr,
    wa_ptr,
    row0,
    end,
    n0,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    CONCATENATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    FAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dh and w*a of the tile whose `dout @ down` is g, WIDTH columns at a time; return its part of `<g, a>`.

    What comes of h is several times as large as g. Splitting columns moves nothing between threads.
    """
    if BLOCK_N > WIDTH:
        left, right = g.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        partial_R = finish_tile(
            left, w_R, h_ptr, dh_ptr, wa_ptr, row0, end, n0,
            I, GATED, CONCATENATED, ACTIVATION, LIMIT, ALPHA, FAST, WIDTH, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        return partial_R + finish_tile(
            right, w_R, h_ptr, dh_ptr, wa_ptr, row0, end, n0 + BLOCK_N // 2,
            I, GATED, CONCATENATED, ACTIVATION, LIMIT, ALPHA, FAST, WIDTH, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        return _finish_columns(
            g, w_R, h_ptr, dh_ptr, wa_ptr, row0, end, n0,
            I, GATED, CONCATENATED, ACTIVATION, LIMIT, ALPHA, FAST, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _finish_columns(
    g,
    w_R,
    h_ptr,
    dh_ptr,
    wa_ptr,
    row0,
    end,
    n0,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    CONCATENATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.arange(0, BLOCK_M)[:, None]
    column = n0 + tl.arange(0, BLOCK_N)[None, :]
    here = (row0 + row < end) & (column < I)
    J: tl.constexpr = 2 * I if GATED else I
    h_ptr += row0.to(tl.int64) * J  # 64-bit starts and 32-bit offsets inside the tile: registers
    dh_ptr += row0.to(tl.int64) * J
    wa_ptr += row0.to(tl.int64) * I
    element = dh_ptr.dtype.element_ty
    # each output is stored as soon as it is known: registers
    if not GATED:
        at = row * I + column
        a, slope = derivative_alone(tl.load(h_ptr + at, mask=here, other=0.0).to(tl.float32), ACTIVATION)
        tl.store(dh_ptr + at, (g * w_R[:, None] * slope).to(element), mask=here)
    elif CONCATENATED:
        h_at = row * (2 * I) + column
        gate = tl.load(h_ptr + h_at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + I + h_at, mask=here, other=0.0).to(tl.float32)
        act, factor, slope, act_open = derivatives(gate, up, ACTIVATION, LIMIT, ALPHA, FAST)
        a = act * factor
        da = g * w_R[:, None]
        tl.store(dh_ptr + I + h_at, (da * act_open).to(element), mask=here)
        tl.store(dh_ptr + h_at, (da * factor * slope).to(element), mask=here)
    else:
        wide = 2 * n0 + tl.arange(0, 2 * BLOCK_N)[None, :]
        h_at = row * (2 * I) + wide
        here_wide = (row0 + row < end) & (wide < 2 * I)
        h = tl.load(h_ptr + h_at, mask=here_wide, other=0.0).to(tl.float32)
        gate, up = h.reshape(BLOCK_M, BLOCK_N, 2).split()
        act, factor, slope, act_open = derivatives(gate, up, ACTIVATION, LIMIT, ALPHA, FAST)
        da = g * w_R[:, None]
        a = act * factor
        partial_R = tl.sum(g * a, 1)
        dh = tl.interleave((da * factor * slope).to(element), (da * act_open).to(element))
        tl.store(dh_ptr + h_at, dh, mask=here_wide)
    tl.store(wa_ptr + (row * I + column), (a * w_R[:, None]).to(element), mask=here)
    # a is 0 where nothing was loaded. What keeps all in registers differs (Triton 3.9, 128x256): here the sum at the
    # end, over what is masked once more; for interleaved weights the sum before the stores
    if CONCATENATED:
        partial_R = tl.sum(tl.where(here, g * a, 0.0), 1)
    return partial_R
