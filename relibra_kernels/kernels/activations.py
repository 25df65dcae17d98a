# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""What an expert computes between its two projections, element by element in fp32, with its derivatives.

The fused GEMM kernels call these on their accumulators. The names of activations are those of `ExpertForm`; the same in
plain torch is `reference/swiglu.py`. Limits keep NaN, as torch's do; a GPU's default minimum of NaN and a number is the
number.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid_of(x, SCALE: tl.constexpr, FAST: tl.constexpr):
    """`1 / (1 + exp(-SCALE * x))` in fp32.

    FAST: by NVIDIA's approximate exponential and reciprocal, for values that are rounded to 2 bytes in the end. The
    relative error is below 2^-20 where |SCALE * x| <= 8, and below 2^-17 down to SCALE * x = -87. Further down the
    result is 0 instead of less than 2^-125. (`tests/relibra_kernels/test_sigmoid.py`)
    """
    if FAST:
        exponential = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * (SCALE * -1.4426950408889634)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exponential], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / (1.0 + tl.exp(-SCALE * x))


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, FAST: tl.constexpr):
    """a from fp32 gate and up."""
    if ACTIVATION == "clamped":
        gate = _at_most(gate, LIMIT)
        return gate * sigmoid_of(gate, ALPHA, FAST) * (_clamp(up, LIMIT) + 1.0)
    elif ACTIVATION == "clamped_silu":
        gate = _at_most(gate, LIMIT)
        return gate * sigmoid_of(gate, 1.0, FAST) * _clamp(up, LIMIT)
    elif ACTIVATION == "capped_silu":
        return _at_most(gate * sigmoid_of(gate, 1.0, FAST), LIMIT) * _clamp(up, LIMIT)
    elif ACTIVATION == "gelu_tanh":
        return gate * sigmoid_of(_of_tanh(gate), 2.0, FAST) * up
    else:
        tl.static_assert(ACTIVATION == "silu")
        return gate * sigmoid_of(gate, 1.0, FAST) * up


@triton.jit
def derivatives(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, FAST: tl.constexpr):
    """(act, factor, slope, act_open) with a = act * factor, dgate = da * factor * slope, dup = da * act_open.

    A clamped element on its limit passes the gradient.
    """
    if ACTIVATION == "clamped":
        clamped = _at_most(gate, LIMIT)
        sigmoid = sigmoid_of(clamped, ALPHA, FAST)
        act = clamped * sigmoid
        slope = tl.where(gate > LIMIT, 0.0, sigmoid + ALPHA * act * (1.0 - sigmoid))
        return act, _clamp(up, LIMIT) + 1.0, slope, _open(act, up, LIMIT)
    elif ACTIVATION == "clamped_silu":
        clamped = _at_most(gate, LIMIT)
        sigmoid = sigmoid_of(clamped, 1.0, FAST)
        act = clamped * sigmoid
        slope = tl.where(gate > LIMIT, 0.0, sigmoid + act * (1.0 - sigmoid))
        return act, _clamp(up, LIMIT), slope, _open(act, up, LIMIT)
    elif ACTIVATION == "capped_silu":
        sigmoid = sigmoid_of(gate, 1.0, FAST)
        silu = gate * sigmoid
        act = _at_most(silu, LIMIT)
        slope = tl.where(silu > LIMIT, 0.0, sigmoid + silu * (1.0 - sigmoid))
        return act, _clamp(up, LIMIT), slope, _open(act, up, LIMIT)
    elif ACTIVATION == "gelu_tanh":
        sigmoid = sigmoid_of(_of_tanh(gate), 2.0, FAST)
        act = gate * sigmoid
        # gelu' = s + g s (1 - s) 2 u', with u' = c (1 + 3 k g^2)
        inner = 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
        return act, up, sigmoid + act * (1.0 - sigmoid) * inner, act
    else:
        tl.static_assert(ACTIVATION == "silu")
        sigmoid = sigmoid_of(gate, 1.0, FAST)
        act = gate * sigmoid
        return act, up, sigmoid + act * (1.0 - sigmoid), act


@triton.jit
def activate_alone(up, ACTIVATION: tl.constexpr):
    """a from fp32 up, of experts without a gate."""
    tl.static_assert(ACTIVATION == "relu2")
    positive = tl.maximum(up, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def derivative_alone(up, ACTIVATION: tl.constexpr):
    """(a, da/dup)."""
    tl.static_assert(ACTIVATION == "relu2")
    positive = tl.maximum(up, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive, 2.0 * positive


@triton.jit
def _at_most(x, LIMIT: tl.constexpr):
    return tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(up, LIMIT: tl.constexpr):
    return tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _open(act, up, LIMIT: tl.constexpr):
    return tl.where(tl.abs(up) <= LIMIT, act, 0.0)


@triton.jit
def _of_tanh(gate):
    """u of gelu(g) = g / 2 * (1 + tanh(u)) = g * sigmoid(2u)."""
    return 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
