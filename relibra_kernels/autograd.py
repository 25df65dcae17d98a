"""The MoE MLP over one schedule: `out[t] = sum_k w[t, k] * down[e](swiglu(gate_up[e](x[t])))`, forward and backward.

Two plain functions, which the expert-parallel runtime calls around its own communication, and the autograd Function
over them for one process. Saved for backward: x, h, indices and weights; nothing of size T*K x H, and no activation.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import ops
from .form import ExpertForm
from .operands import check_layer
from .planner.errors import ShapeError
from .schedule import Schedule
from .slot_products import Products
from .weights import ExpertWeights, gradient_buffers, gradients_asked_for, main_grads, returned_gradients

NO_WEIGHTS = ExpertWeights(None, None)


def moe_mlp_forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    schedule: Schedule,
    home: ExpertWeights,
    form: ExpertForm,
    *,
    replica: ExpertWeights | None = None,
    weight_of_slot: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    checked: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out [T, H], h [T*K, 2I])`; h is what backward needs, `[T*K, I]` without a gate. A token whose assignments are
    all dropped gives zeros.

    Args:
        x_TH: rows, contiguous, in the dtype of the weights.
        weights_TK: gate weights, any floating dtype.
        checked: everything is known to fit together.
        out: contiguous, where to write, in a dtype that may differ from x's; new memory where None.
        home: weights `[E, ...]`. replica: weights of the replica slots `[S, ...]`.
        weight_of_slot: int32 [slots], index into home, then replica; None: slot i uses weight i.
    """
    if not checked:
        check_layer(x_TH, weights_TK, schedule, home, form, replica, weight_of_slot)
    products = Products(schedule, form, home, replica or NO_WEIGHTS, weight_of_slot)
    h_RJ, a_RI = products.gate_up(x_TH)
    y_RH = products.whole(a_RI, "down", transpose=not form.is_transposed, bias=True)
    if out is not None and out.dtype != y_RH.dtype:
        y_RH = y_RH.to(out.dtype)
    return ops.unpermute(y_RH, weights_TK, schedule, out=out), h_RJ


def moe_mlp_backward(
    dout_TH: torch.Tensor,
    x_TH: torch.Tensor,
    h_RJ: torch.Tensor | None,
    weights_TK: torch.Tensor,
    schedule: Schedule,
    home: ExpertWeights,
    form: ExpertForm,
    *,
    grad: ExpertWeights,
    replica: ExpertWeights | None = None,
    replica_grad: ExpertWeights | None = None,
    weight_of_slot: torch.Tensor | None = None,
    accumulate: bool = True,
    out_dtype: torch.dtype | None = None,
    checked: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dx [T, H], dweights [T, K] in fp32)`; weight gradients are added to the given fp32 buffers, in place.

    Args:
        h_RJ: from forward; None computes it again.
        grad, replica_grad: fp32 buffers shaped like `home` and `replica`; what is None is not computed.
        accumulate: False overwrites the buffers (any dtype), with zeros for weights without rows.
        checked: as for forward.
        out_dtype: of dx; the dtype of x where None.
    """
    if not checked:
        check_layer(x_TH, weights_TK, schedule, home, form, replica, weight_of_slot)
    if dout_TH.shape != x_TH.shape or dout_TH.dtype != x_TH.dtype or not dout_TH.is_contiguous():
        raise ShapeError(
            f"dout is {dout_TH.dtype} {tuple(dout_TH.shape)} with strides {dout_TH.stride()}; "
            f"it must be contiguous {x_TH.dtype} {tuple(x_TH.shape)}"
        )
    products = Products(schedule, form, home, replica or NO_WEIGHTS, weight_of_slot)
    if h_RJ is None:
        h_RJ, _ = products.gate_up(x_TH)
    dh_RJ, wa_RI, dweights_TK = products.grad_hidden(dout_TH, h_RJ, weights_TK)
    transposed, grads = form.is_transposed, (grad, replica_grad or NO_WEIGHTS)
    products.grad_weight("down", *grads, dout_TH, wa_RI, tokens_left=not transposed, accumulate=accumulate)
    products.grad_weight("gate_up", *grads, x_TH, dh_RJ, tokens_left=transposed, accumulate=accumulate)
    products.grad_bias("down_bias", *grads, dout_TH, weights_TK=weights_TK, gather=True, accumulate=accumulate)
    products.grad_bias("gate_up_bias", *grads, dh_RJ, accumulate=accumulate)
    dx_RH = products.whole(dh_RJ, "gate_up", transpose=transposed)
    return ops.unpermute(dx_RH.to(out_dtype or dx_RH.dtype), None, schedule), dweights_TK


def moe_mlp(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    schedule: Schedule,
    home: ExpertWeights,
    form: ExpertForm,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """The differentiable MoE MLP of one process.

    A parameter with a `.main_grad` (fp32) gets its gradient added there, and none through autograd.
    `recompute` saves x, indices and weights only and computes h again in backward.
    """
    return _MoeMlp.apply(x_TH, weights_TK, schedule, form, recompute, *home)


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        schedule: Schedule,
        form: ExpertForm,
        recompute: bool,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        home = ExpertWeights(*parameters)
        out_TH, h_RJ = moe_mlp_forward(x_TH, weights_TK, schedule, home, form)
        tables = (schedule.slot_offsets, schedule.assignment_of, schedule.position_of)
        ctx.save_for_backward(x_TH, None if recompute else h_RJ, weights_TK, *home, *tables)
        ctx.form, ctx.tiles = form, schedule.tiles
        ctx.main_grads = main_grads(home)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, h_RJ, weights_TK, *saved = ctx.saved_tensors
        *parameters, slot_offsets, assignment_of, position_of = saved
        home = ExpertWeights(*parameters)
        needed = gradients_asked_for(ctx, home)
        # One `accumulate` holds for all of them: they are added to buffers, or all are new and in their own dtype.
        accumulate = any(main_grad is not None for main_grad in ctx.main_grads)
        if accumulate:
            grad = gradient_buffers(home, ctx.main_grads, needed)
        else:
            grad = ExpertWeights(*(torch.empty_like(p) if need else None for p, need in zip(home, needed, strict=True)))
        dx_TH, dweights_TK = moe_mlp_backward(
            dout_TH.contiguous(),
            x_TH,
            h_RJ,
            weights_TK,
            Schedule(slot_offsets, assignment_of, position_of, ctx.tiles),
            home,
            ctx.form,
            grad=grad,
            accumulate=accumulate,
        )
        grads = returned_gradients(home, grad, ctx.main_grads, needed)
        return dx_TH, dweights_TK.to(weights_TK.dtype), None, None, None, *grads
