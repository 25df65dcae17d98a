"""The gated activation a = act * factor and its gradient, in the layouts of `ExpertForm`, computed in fp32."""

import math

import torch
from torch.nn import functional

from ..form import ExpertForm


def swiglu(h_RJ: torch.Tensor, form: ExpertForm) -> torch.Tensor:
    """`[R, 2I] -> [R, I]`; `[R, I]` in where there is no gate."""
    if not form.has_gate:
        return _accumulated(h_RJ).relu().square().to(h_RJ.dtype)
    gate, up = _gate_and_up(h_RJ, form)
    if form.activation == "silu":
        return functional.silu(gate).mul_(up).to(h_RJ.dtype)
    if form.activation == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh").mul_(up).to(h_RJ.dtype)
    act, factor, _, _ = _derivatives(gate, up, form)
    return act.mul_(factor).to(h_RJ.dtype)


def swiglu_backward(da_RI: torch.Tensor, h_RJ: torch.Tensor, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dh as h, a [R, I])` from da and h; `a` is recomputed on the way and kept in fp32.

    A clamped element passes its gradient where it lies on the limit, as torch.clamp does.
    """
    if not form.has_gate:
        positive = _accumulated(h_RJ).relu()
        return (2 * positive * da_RI.to(positive.dtype)).to(h_RJ.dtype), positive.square()
    gate, up = _gate_and_up(h_RJ, form)
    da = da_RI.to(gate.dtype)
    dh_RJ = torch.empty_like(h_RJ)
    dgate, dup = split_gate_up(dh_RJ, form)
    act, factor, slope, up_open = _derivatives(gate, up, form)
    dup.copy_(da * act if up_open is None else da * act * up_open)
    dgate.copy_(slope.mul_(factor).mul_(da))
    return dh_RJ, act.mul_(factor)


def _derivatives(
    gate: torch.Tensor, up: torch.Tensor, form: ExpertForm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(act, factor, slope, where up is not clamped or None): a = act * factor, da/dgate = factor * slope."""
    if form.activation == "gelu_tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        sigmoid = torch.sigmoid(2 * c * gate * (1 + k * gate * gate))  # (1 + tanh(u)) / 2
        act = gate * sigmoid
        slope = sigmoid + act * (1 - sigmoid) * (2 * c * (1 + 3 * k * gate * gate))
        return act, up, slope, None
    if form.activation in ("clamped", "clamped_silu"):
        is_open, gate = gate <= form.limit, gate.clamp(max=form.limit)
    alpha = form.alpha if form.activation == "clamped" else 1.0
    sigmoid = torch.sigmoid(gate if alpha == 1.0 else alpha * gate)
    act = gate * sigmoid
    # silu' = s * (1 + alpha * g * (1 - s)) = s + alpha * silu * (1 - s)
    slope = torch.addcmul(sigmoid, act, 1 - sigmoid, value=alpha)
    if form.activation == "silu":
        return act, up, slope, None
    if form.activation == "capped_silu":
        is_open, act = act <= form.limit, act.clamp(max=form.limit)
    factor = up.clamp(-form.limit, form.limit)
    return act, factor + 1 if form.activation == "clamped" else factor, slope.mul_(is_open), up.abs() <= form.limit


def split_gate_up(h_RJ: torch.Tensor, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gate and up columns."""
    if form.is_concatenated:
        intermediate_size = h_RJ.shape[-1] // 2
        return h_RJ[..., :intermediate_size], h_RJ[..., intermediate_size:]
    return h_RJ[..., 0::2], h_RJ[..., 1::2]


def _gate_and_up(h_RJ: torch.Tensor, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = split_gate_up(h_RJ, form)
    return _accumulated(gate), _accumulated(up)


def _accumulated(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
