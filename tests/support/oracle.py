"""The MoE MLP one token and one expert at a time, in float64, with autograd: slow, obvious, and written apart."""

import torch


def gated(h: torch.Tensor, form) -> torch.Tensor:
    """The activation of one row `[2I]`, or `[I]` without a gate."""
    if form.activation == "relu2":
        return torch.relu(h) ** 2
    intermediate_size = h.shape[0] // 2
    gate, up = (h[:intermediate_size], h[intermediate_size:]) if form.is_concatenated else (h[::2], h[1::2])
    if form.activation in ("clamped", "clamped_silu"):
        gate = gate.clamp(max=form.limit)
    if form.activation in ("clamped", "clamped_silu", "capped_silu"):
        up = up.clamp(-form.limit, form.limit)
    if form.activation == "gelu_tanh":
        return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    if form.activation == "clamped":
        return gate / (1 + torch.exp(-form.alpha * gate)) * (up + 1)
    silu = gate / (1 + torch.exp(-gate))
    return (silu.clamp(max=form.limit) if form.activation == "capped_silu" else silu) * up


def moe_mlp_oracle(x, weights, slots, form, gate_up, down, gate_up_bias=None, down_bias=None, weight_of_slot=None):
    """`out [T, H]` from float64 inputs; gate_up and down hold home and replica weights one after the other."""
    out = []
    for t in range(x.shape[0]):
        total = x[t] * 0.0
        for k in range(slots.shape[1]):
            slot = int(slots[t, k])
            if slot < 0:
                continue
            e = slot if weight_of_slot is None else int(weight_of_slot[slot])
            w1, w2 = (gate_up[e].T, down[e].T) if form.is_transposed else (gate_up[e], down[e])
            h = w1 @ x[t]
            if gate_up_bias is not None:
                h = h + gate_up_bias[e]
            a = gated(h, form)
            y = w2 @ a
            if down_bias is not None:
                y = y + down_bias[e]
            total = total + weights[t, k] * y
        out.append(total)
    return torch.stack(out) if out else x * 1.0
