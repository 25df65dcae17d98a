"""The gated activation a = act(gate) * up and its gradient, in the layouts of `ExpertForm`, computed in fp32."""

import torch

from ..form import ExpertForm


def swiglu(h_RJ: torch.Tensor, form: ExpertForm) -> torch.Tensor:
    """`[R, 2I] -> [R, I]`."""
    gate, up = _gate_and_up(h_RJ, form)
    if form.activation == "silu":
        return torch.nn.functional.silu(gate).mul_(up).to(h_RJ.dtype)
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return (torch.sigmoid(form.alpha * gate).mul_(gate).mul_(up + 1)).to(h_RJ.dtype)


def swiglu_backward(da_RI: torch.Tensor, h_RJ: torch.Tensor, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dh [R, 2I], a [R, I])` from da and h; `a` is recomputed on the way and kept in fp32.

    A clamped element passes its gradient where it lies on the limit, as torch.clamp does.
    """
    gate, up = _gate_and_up(h_RJ, form)
    da = da_RI.to(gate.dtype)
    dh_RJ = torch.empty_like(h_RJ)
    dgate, dup = split_gate_up(dh_RJ, form)
    if form.activation == "silu":
        sigmoid = torch.sigmoid(gate)
        act = gate * sigmoid
        dup.copy_(da * act)
        # silu' = s * (1 + g * (1 - s)) = s + silu * (1 - s)
        slope = torch.addcmul(sigmoid, act, 1 - sigmoid)
        dgate.copy_(slope.mul_(up).mul_(da))
        return dh_RJ, act.mul_(up)
    gate_open, up_open = gate <= form.limit, up.abs() <= form.limit
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    sigmoid = torch.sigmoid(form.alpha * gate)
    act = gate * sigmoid
    dup.copy_(da * act * up_open)
    slope = torch.addcmul(sigmoid, act, 1 - sigmoid, value=form.alpha)
    dgate.copy_(slope * (up + 1) * da * gate_open)
    return dh_RJ, act.mul_(up + 1)


def split_gate_up(h_RJ: torch.Tensor, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gate and up columns."""
    if form.is_concatenated:
        intermediate_size = h_RJ.shape[-1] // 2
        return h_RJ[..., :intermediate_size], h_RJ[..., intermediate_size:]
    return h_RJ[..., 0::2], h_RJ[..., 1::2]


def _gate_and_up(h_RJ: torch.Tensor, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor]:
    accumulate = torch.promote_types(h_RJ.dtype, torch.float32)
    gate, up = split_gate_up(h_RJ, form)
    return gate.to(accumulate), up.to(accumulate)
