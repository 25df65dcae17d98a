"""From the output's gradient back to h in one pass: gather dout, times downᵀ, recompute a, dSwiGLU.

Row r is token t under one of its choices, with gate weight w and activation `a = act(h)`; `g[r] = dout[t] @ down`.
Three results: `dh = dSwiGLU(w * g, h)`; the gate weight's gradient `<g, a> + <dout, bias>`, dot products
over columns; and `w * a`, from which `grad_weight` makes the gradient of down.

Each column tile writes its part of `<g, a>` as fp32 partials; a second kernel adds them in order: no atomics.
"""

import torch
import triton

from ..configs.config import GemmConfig
from ..configs.half_tiles import has_half_tile
from ..form import ExpertForm
from ..operands import check_gate_weights, check_operands
from ..schedule import Schedule
from .constants import ceil_div, chosen_config, flat_slots, gemm_constants, grid_of, next_power_of_2, row_tiles
from .grad_hidden_kernels import _dweights_kernel, _grad_hidden_kernel
from .launch import launch
from .stores import two_stores
from .swiglu import form_constants


def _flattens(form: ExpertForm) -> bool:
    """Whether the tile loop may be flattened: with other activations or interleaved weights Triton 3.9 spills then."""
    return form.is_concatenated and form.activation in ("silu", "relu2")


def _epilogue_width(config: GemmConfig, form: ExpertForm) -> int:
    """Columns that are finished at a time: as many as the registers beside the accumulator allow."""
    a_thread = config.block_m * config.block_n // (32 * config.num_warps)
    if a_thread > 64:
        # Triton 3.6 spills 32 bytes with 16 columns on sm_90; 8 are stored in pieces of 8 bytes
        interleaved = 8 if triton.__version__.startswith("3.6.") else 16
        # Triton 3.9 spills 8 bytes of capped_silu with 32 columns on sm_80
        concatenated = 16 if form.activation == "capped_silu" else 32
        return concatenated if form.is_concatenated else interleaved
    return max(config.block_n // (2 if form.is_concatenated else 4), 16)


def grad_hidden(
    dout_TH: torch.Tensor,
    h_RJ: torch.Tensor,
    weights_TK: torch.Tensor,
    down: torch.Tensor,
    schedule: Schedule,
    form: ExpertForm,
    *,
    bias: torch.Tensor | None = None,
    replica_down: torch.Tensor | None = None,
    replica_bias: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(dh as h, w*a [rows, I], dweights [T, K] in fp32)`; rows of the unused tail are undefined."""
    intermediate_size, hidden_size = form.intermediate_size(h_RJ.shape[1]), dout_TH.shape[1]
    check_operands(dout_TH, schedule.num_tokens, down, replica_down, bias, replica_bias)
    check_operands(h_RJ, schedule.num_rows, down)
    check_gate_weights(weights_TK, schedule)
    config = config or chosen_config(
        "grad_hidden",
        dout_TH,
        schedule,
        (intermediate_size, hidden_size),
        layout=form.is_transposed,
        interleaved=not form.is_concatenated,
    )
    num_n = ceil_div(intermediate_size, config.block_n)
    half_last = has_half_tile("grad_hidden", intermediate_size, config.block_n)
    dh_RJ, wa_RI = h_RJ.new_empty(h_RJ.shape), h_RJ.new_empty(schedule.num_rows, intermediate_size)
    partials = torch.empty(num_n, schedule.num_rows, dtype=torch.float32, device=h_RJ.device)
    dweights_TK = torch.empty(schedule.position_of.shape, dtype=torch.float32, device=h_RJ.device)
    tiles = row_tiles(schedule, config.block_m)
    num_tiles = tiles.shape[0]
    if not schedule.num_rows:
        return dh_RJ, wa_RI, dweights_TK.zero_()
    stores = two_stores(down, replica_down)
    launch(
        _grad_hidden_kernel,
        grid_of(dout_TH, num_tiles * num_n, config),
        dout_TH,
        stores.base,
        stores.other,
        h_RJ,
        weights_TK,
        dh_RJ,
        wa_RI,
        partials,
        tiles,
        schedule.slot_offsets,
        weight_of_slot,
        schedule.assignment_of,
        num_tiles,
        schedule.num_slots,
        dout_TH.shape[0],
        down.shape[0],
        *stores.arguments,
        schedule.num_rows,
        I=intermediate_size,
        D=hidden_size,
        TOP_K=schedule.top_k,
        ROWS_ARE_N=form.is_transposed,
        GROUP_M=config.group_m,
        FLAT_SLOTS=flat_slots(dout_TH, schedule, stores) if _flattens(form) and not half_last else 0,
        WIDTH=_epilogue_width(config, form),
        HALF_LAST=half_last,
        **form_constants(form, dout_TH),
        **gemm_constants(
            dout_TH,
            config,
            widths=(hidden_size, intermediate_size),
            described=(dout_TH, down, replica_down),
            gathered_depth=hidden_size,
        ),
    )
    launch(
        _dweights_kernel,
        (dout_TH.shape[0],),
        partials,
        dout_TH,
        bias,
        replica_bias,
        schedule.position_of,
        schedule.slot_offsets,
        weight_of_slot,
        dweights_TK,
        schedule.num_rows,
        down.shape[0],
        NUM_PARTIALS=num_n,
        NUM_SLOTS=schedule.num_slots,
        SEARCH_STEPS=schedule.num_slots.bit_length() + 1,
        H=hidden_size,
        TOP_K=schedule.top_k,
        LANES=next_power_of_2(schedule.top_k),
        BLOCK_H=min(next_power_of_2(hidden_size), 256),
        num_warps=1,
    )
    return dh_RJ, wa_RI, dweights_TK
