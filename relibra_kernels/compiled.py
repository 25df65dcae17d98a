# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""The MoE MLP as two functional custom ops, so that torch.compile takes a model with it as one graph.

Gradients are returned; adding to `.main_grad` is for eager mode (`autograd.moe_mlp`).
"""

from typing import Any, cast

import torch

from . import ops
from .autograd import moe_mlp_backward, moe_mlp_forward
from .form import Activation, ExpertForm
from .weights import ExpertWeights


@torch.library.custom_op("relibra::moe_mlp", mutates_args=())
def _forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    is_transposed: bool,
    is_concatenated: bool,
    activation: str,
    limit: float,
    alpha: float,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, h); h is empty where it is to be computed again."""
    home = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    form = _form(home, is_transposed, is_concatenated, activation, limit, alpha)
    out_TH, h_RJ = moe_mlp_forward(x_TH, weights_TK, ops.build_schedule(slot_TK, len(down)), home, form)
    return out_TH, h_RJ[:0].clone() if recompute else h_RJ


@_forward.register_fake
def _(x_TH, weights_TK, slot_TK, gate_up, down, gate_up_bias, down_bias, is_transposed, *form) -> Any:
    recompute = form[-1]
    rows = 0 if recompute else slot_TK.shape[0] * slot_TK.shape[1]
    return torch.empty_like(x_TH), x_TH.new_empty(rows, gate_up.shape[2 if is_transposed else 1])


@torch.library.custom_op("relibra::moe_mlp_backward", mutates_args=())
def _backward(
    dout_TH: torch.Tensor,
    x_TH: torch.Tensor,
    h_RJ: torch.Tensor,
    weights_TK: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    is_transposed: bool,
    is_concatenated: bool,
    activation: str,
    limit: float,
    alpha: float,
    recompute: bool,
) -> list[torch.Tensor]:
    """dx, dweights, and the gradients of the weights that there are."""
    home = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    grad = home.map(torch.empty_like)
    dx_TH, dweights_TK = moe_mlp_backward(
        dout_TH.contiguous(),
        x_TH,
        None if recompute else h_RJ,
        weights_TK,
        ops.build_schedule(slot_TK, len(down)),
        home,
        _form(home, is_transposed, is_concatenated, activation, limit, alpha),
        grad=grad,
        accumulate=False,
    )
    return [dx_TH, dweights_TK.to(weights_TK.dtype), *grad.tensors()]


@_backward.register_fake
def _(dout_TH, x_TH, h_RJ, weights_TK, slot_TK, *rest) -> Any:
    return [torch.empty_like(tensor) for tensor in (x_TH, weights_TK, *rest[:4]) if tensor is not None]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_TH, weights_TK, slot_TK, *rest = inputs
    ctx.save_for_backward(x_TH, output[1], weights_TK, slot_TK, *rest[:4])
    ctx.form = rest[4:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout_TH: torch.Tensor, _: torch.Tensor | None) -> tuple:
    parameters = ctx.saved_tensors[4:]
    dx_TH, dweights_TK, *grads = _backward(dout_TH, *ctx.saved_tensors, *ctx.form)
    remaining = iter(grads)
    return (
        dx_TH,
        dweights_TK,
        None,
        *(None if parameter is None else next(remaining) for parameter in parameters),
        *(None for _ in ctx.form),
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def moe_mlp_functional(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    slot_TK: torch.Tensor,
    home: ExpertWeights,
    form: ExpertForm,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """`autograd.moe_mlp` from the slots of assignments, for torch.compile; low-rank terms are added to the weights."""
    base = home.merged()
    parameters = (base.gate_up, base.down, base.gate_up_bias, base.down_bias)
    flags = (form.is_transposed, form.is_concatenated, form.activation, form.limit, form.alpha)
    return _forward(x_TH, weights_TK, slot_TK, *parameters, *flags, recompute)[0]


def _form(
    home: ExpertWeights, is_transposed: bool, is_concatenated: bool, activation: str, limit: float, alpha: float
) -> ExpertForm:
    known = cast(Activation, activation)
    return ExpertForm(is_transposed, is_concatenated, home.down_bias is not None, known, limit, alpha)
