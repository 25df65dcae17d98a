# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""The activation and its gradient alone, element by element: what the fused GEMMs compute on their accumulators."""

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl

from ..configs.config import BlockConfig
from ..form import ExpertForm
from .activations import activate, derivative_alone, derivatives
from .constants import block_of, ceil_div, chosen_block
from .launch import launch, target


@triton.jit
def _swiglu_kernel(
    h_ptr,
    da_ptr,
    out_ptr,
    a_ptr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    CONCATENATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: `a` into out, or where da is given dh into out and a (fp32) beside it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    if not GATED:
        at = row * I + column
        up = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        a, slope = derivative_alone(up, ACTIVATION)
        if da_ptr is None:
            tl.store(out_ptr + at, a.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            da = tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, (da * slope).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(a_ptr + at, a, mask=inside)
    else:
        gate_at = row * 2 * I + (column if CONCATENATED else 2 * column)
        up_at = gate_at + (I if CONCATENATED else 1)
        gate = tl.load(h_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + up_at, mask=inside, other=0.0).to(tl.float32)
        if da_ptr is None:
            a = activate(gate, up, ACTIVATION, LIMIT, ALPHA, FAST)
            tl.store(out_ptr + row * I + column, a.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            da = tl.load(da_ptr + row * I + column, mask=inside, other=0.0).to(tl.float32)
            act, factor, slope, act_open = derivatives(gate, up, ACTIVATION, LIMIT, ALPHA, FAST)
            tl.store(out_ptr + gate_at, (da * factor * slope).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out_ptr + up_at, (da * act_open).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(a_ptr + row * I + column, act * factor, mask=inside)


def form_constants(form: ExpertForm, tensor: torch.Tensor) -> Mapping[str, bool | float | str]:
    """`form` as the kernels' constants, for tensors like this one: 2-byte types get the fast sigmoid on NVIDIA."""
    device = target(tensor)
    return _form_constants(form, tensor.element_size() == 2 and device.backend == "cuda" and not device.interpreted)


@cache
def _form_constants(form: ExpertForm, is_fast: bool) -> Mapping[str, bool | float | str]:
    return {
        "GATED": form.has_gate,
        "CONCATENATED": form.is_concatenated,
        "ACTIVATION": form.activation,
        "LIMIT": form.limit,
        "ALPHA": form.alpha,
        "FAST": is_fast,
    }


def swiglu(h_RJ: torch.Tensor, form: ExpertForm, *, config: BlockConfig | None = None) -> torch.Tensor:
    """`[R, 2I] -> [R, I]`; `[R, I]` in where there is no gate."""
    a_RI = h_RJ.new_empty(len(h_RJ), form.intermediate_size(h_RJ.shape[1]))
    _launch(h_RJ, None, a_RI, None, form, config)
    return a_RI


def swiglu_backward(
    da_RI: torch.Tensor, h_RJ: torch.Tensor, form: ExpertForm, *, config: BlockConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dh as h, a [R, I])` from da and h; `a` is recomputed on the way and kept in fp32."""
    dh_RJ, a_RI = torch.empty_like(h_RJ), torch.empty(da_RI.shape, dtype=torch.float32, device=h_RJ.device)
    _launch(h_RJ, da_RI, dh_RJ, a_RI, form, config)
    return dh_RJ, a_RI


def _launch(
    h_RJ: torch.Tensor,
    da_RI: torch.Tensor | None,
    out: torch.Tensor,
    a_RI: torch.Tensor | None,
    form: ExpertForm,
    config: BlockConfig | None,
) -> None:
    rows, intermediate_size = len(h_RJ), form.intermediate_size(h_RJ.shape[1])
    part = "swiglu" if da_RI is None else "swiglu_backward"
    config = config or chosen_block(
        "swiglu", h_RJ, intermediate_size, rows, interleaved=not form.is_concatenated, part=part
    )
    block, warps = block_of(config, intermediate_size, h_RJ.element_size())
    how = {"I": intermediate_size, "BLOCK": block, "num_warps": warps, **form_constants(form, h_RJ)}
    launch(_swiglu_kernel, (rows, ceil_div(intermediate_size, block)), h_RJ, da_RI, out, a_RI, **how)
