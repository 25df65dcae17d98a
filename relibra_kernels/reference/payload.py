"""Payload rows (`relibra_kernels.payload`) packed, taken apart, and their gradients added up."""

import torch

from ..payload import PayloadLayout, check_payload, check_sent, check_tokens, layout_of
from ..schedule import Schedule
from .unpermute import added_up


def pack_payload(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, slots_NK: torch.Tensor, send: Schedule, out: torch.Tensor
) -> None:
    """Write payload rows of tokens on their way to other ranks.

    A token has one row for each rank that it visits, with all K of its gate weights.

    Args:
        x_TH: hidden states, contiguous. weights_TK: gate weights, any floating dtype; they travel in fp32, or float64.
        slots_NK: int16, the slot of each choice of a row on the rank that it goes to; -1 for those elsewhere.
        send: which token each of the N rows is of: rows by the first choice that goes with them.
        out: uint8 [N, row_bytes], contiguous.

    Raises: ShapeError where these do not go together.
    """
    check_tokens(x_TH, weights_TK)
    check_sent(weights_TK, slots_NK, send)
    layout = layout_of(x_TH, weights_TK)
    check_payload(out, layout, send.num_rows)
    token_N = torch.div(send.assignment_of, send.top_k, rounding_mode="floor")
    layout.hidden(out).copy_(x_TH.index_select(0, token_N))
    layout.weights(out).copy_(weights_TK.index_select(0, token_N))
    layout.slots(out).copy_(slots_NK)


def unpack_payload(payload: torch.Tensor, layout: PayloadLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(x [rows, H], weights [rows, K], slots int16 [rows, K])` of received rows, contiguous."""
    check_payload(payload, layout)
    parts = layout.hidden(payload), layout.weights(payload), layout.slots(payload)
    x_RH, weights_RK, slots_RK = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return x_RH, weights_RK, slots_RK


def pack_gradients(dx_RH: torch.Tensor, dweights_RK: torch.Tensor, out: torch.Tensor) -> None:
    """Write payload rows on their way back, uint8 `[R, row_bytes]`: a received row's gradient and its gate weights'."""
    check_tokens(dx_RH, dweights_RK)
    layout = PayloadLayout(dx_RH.shape[1], dweights_RK.shape[1], dx_RH.dtype, dweights_RK.dtype, has_slots=False)
    check_payload(out, layout, len(dx_RH))
    layout.hidden(out).copy_(dx_RH)
    layout.weights(out).copy_(dweights_RK)


def unpack_gradients(
    payload: torch.Tensor, send: Schedule, layout: PayloadLayout, *, weights_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dx [T, H], dweights [T, K])`: a token's rows are added up in fp32, in the order of k.

    Args:
        payload: rows as they came back, where `pack_payload` had put them.
        send: as given to `pack_payload`.
        weights_dtype: of dweights; the layout's where None.
    """
    check_payload(payload, layout, send.num_rows)
    dx_TH, dweights_TK = (added_up(part, None, send) for part in (layout.hidden(payload), layout.weights(payload)))
    return dx_TH, dweights_TK.to(weights_dtype or layout.weights_dtype)
