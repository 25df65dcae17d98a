"""Payload rows (`relibra_kernels.payload`) packed, taken apart, and their gradients added up."""

import torch

from ..payload import PayloadLayout, check_payload, check_tables, check_tokens


def pack_payload(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, slot_TK: torch.Tensor, row_of_TK: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Payload rows of tokens on their way to other ranks, uint8 `[num_rows, row_bytes]`.

    A token has one row for each rank that it visits. Assignments of a token that go to the same rank name the same row,
    which carries all of their slots and gate weights; the row's other slots are -1 and its other weights 0.

    Args:
        x_TH: hidden states, contiguous. weights_TK: gate weights, any floating dtype.
        slot_TK: int16, the slot of each assignment on the rank that computes it.
        row_of_TK: int32, the payload row that carries each assignment; -1: it goes nowhere.
        num_rows: rows of the payload; each is named by some assignment.

    Raises: ShapeError where these do not go together.
    """
    check_tokens(x_TH, weights_TK, slot_TK=slot_TK, row_of_TK=row_of_TK)
    layout = PayloadLayout(x_TH.shape[1], weights_TK.shape[1], x_TH.dtype)
    payload = layout.new(num_rows, x_TH.device)
    token, k = (row_of_TK >= 0).nonzero(as_tuple=True)
    row = row_of_TK[token, k].long()
    layout.hidden(payload)[row] = x_TH[token]
    layout.slots(payload).fill_(-1)[row, k] = slot_TK[token, k]
    layout.weights(payload).fill_(0)[row, k] = weights_TK[token, k].float()
    return payload


def unpack_payload(payload: torch.Tensor, layout: PayloadLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(x [rows, H], slots int16 [rows, K], weights fp32 [rows, K])` of received rows, contiguous."""
    check_payload(payload, layout)
    parts = layout.hidden(payload), layout.slots(payload), layout.weights(payload)
    x_RH, slot_RK, weights_RK = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return x_RH, slot_RK, weights_RK


def pack_gradients(dx_RH: torch.Tensor, dweights_RK: torch.Tensor) -> torch.Tensor:
    """Payload rows on their way back: a received row's gradient and those of its gate weights; slots are undefined."""
    check_tokens(dx_RH, dweights_RK)
    layout = PayloadLayout(dx_RH.shape[1], dweights_RK.shape[1], dx_RH.dtype)
    payload = layout.new(len(dx_RH), dx_RH.device)
    layout.hidden(payload).copy_(dx_RH)
    layout.weights(payload).copy_(dweights_RK)
    return payload


def unpack_gradients(
    payload: torch.Tensor, row_of_TK: torch.Tensor, layout: PayloadLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dx [T, H], dweights fp32 [T, K])`: a token's rows are added up in fp32, in the order of k, each once.

    Args:
        payload: rows as they came back, where `pack_payload` had put them.
        row_of_TK: int32, as given to `pack_payload`. Assignments with -1 have gate gradient 0.
    """
    check_payload(payload, layout)
    check_tables(row_of_TK=row_of_TK)
    rows, dx_RH = row_of_TK.long(), layout.hidden(payload)
    total_TH = dx_RH.new_zeros(len(rows), layout.hidden_size, dtype=torch.promote_types(dx_RH.dtype, torch.float32))
    for choice in range(layout.top_k):
        row = rows[:, choice]
        is_first = (row >= 0) & (rows[:, :choice] != row[:, None]).all(1)
        total_TH[is_first] += dx_RH[row[is_first]]
    dweights_TK = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    token, k = (rows >= 0).nonzero(as_tuple=True)
    dweights_TK[token, k] = layout.weights(payload)[rows[token, k], k]
    return total_TH.to(layout.dtype), dweights_TK
