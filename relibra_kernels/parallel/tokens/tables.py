"""What a rank sends and receives in a layer: rows, slots and counts, made on the device from destinations.

A token travels to a rank once, however many of its experts are there. Rows that are sent are ordered by destination,
then by token; those that stay on their rank come last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .destinations import Destinations

CELLS = 1 << 23  # (layer, rank, token) cells that are looked at together: bounds the memory that tables take on the way


@dataclass(frozen=True)
class SendTables:
    """What one rank sends in some layers L, T tokens or rows each. On the device.

    `assignment_of` int32 [L, T * min(K, R)]: the first choice, as t * K + k, of each row that is sent. Unused at the
        end.
    `slots` int16 [L, T * min(K, R), K]: the slot on its destination of each of the row's choices, -1 for those of
        other ranks.
    `position_of` int32 [L, T, K]: the sent row whose first choice this is, else -1.
    `offsets` int32 [L, R + 1]: where the rows for each destination begin, in the order in which they are sent.
    `counts` int32 [L, R, 3], by rank: rows, the most choices that one of them has there, and all those choices.
    """

    assignment_of: Tensor
    slots: Tensor
    position_of: Tensor
    offsets: Tensor
    counts: Tensor

    def of_tokens(self, rows_T: Tensor, token_of_row: Tensor) -> "SendTables":
        """The same for a model's input whose tokens are these rows.

        Args:
            rows_T: int64 [tokens], -1 for padding. token_of_row: int64 [rows + 1], the last one for row -1.
        """
        top_k = self.position_of.shape[2]
        nowhere = self.position_of.new_full((len(self.position_of), 1, top_k), -1)
        row_LN = torch.div(self.assignment_of, top_k, rounding_mode="floor")
        token_LN = token_of_row[row_LN.long()]
        return SendTables(
            assignment_of=(token_LN * top_k + (self.assignment_of - row_LN * top_k)).int(),
            slots=self.slots,
            position_of=torch.cat([self.position_of, nowhere], 1)[:, rows_T].contiguous(),
            offsets=self.offsets,
            counts=self.counts,
        )


def send_tables(destinations: Destinations, num_ranks: int, rank: int) -> SendTables:
    """The tables of all layers at once. Nothing waits for the device."""
    layers, tokens, _ = destinations.rank.shape
    step = max(1, CELLS // max(1, num_ranks * tokens))
    parts = [
        _send_tables(destinations.rank[start : start + step], destinations.slot[start : start + step], num_ranks, rank)
        for start in range(0, layers, step)
    ]
    if len(parts) == 1:
        return parts[0]
    return SendTables(*(torch.cat([getattr(part, name) for part in parts]) for name in SendTables.__annotations__))


def _send_tables(rank_LTK: Tensor, slot_LTK: Tensor, num_ranks: int, me: int) -> SendTables:
    layers, tokens, top_k = rank_LTK.shape
    device, cells = rank_LTK.device, num_ranks * tokens
    known = rank_LTK >= 0
    place = torch.where(rank_LTK > me, rank_LTK - 1, rank_LTK.masked_fill(rank_LTK == me, num_ranks - 1))
    token = torch.arange(tokens, device=device)[:, None]
    cell_LA = torch.where(known, place * tokens + token, cells).flatten(1)  # the last cell is for what goes nowhere
    choices = torch.zeros(layers, cells + 1, dtype=torch.int32, device=device)
    choices.scatter_add_(1, cell_LA, torch.ones_like(cell_LA, dtype=torch.int32))
    visited = choices > 0
    row_of_cell = visited.cumsum(1, dtype=torch.int32) - 1
    bound = tokens * min(top_k, num_ranks)
    row_LTK = torch.where(known, row_of_cell.gather(1, cell_LA).view_as(rank_LTK), bound)
    earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=device).tril(-1)
    again = ((place[..., :, None] == place[..., None, :]) & earlier).any(-1)
    first = known & ~again

    choice = torch.arange(top_k, device=device)
    assignment_of = torch.zeros(layers, bound + 1, dtype=torch.int32, device=device)
    sent_LA = torch.where(first, row_LTK, bound).flatten(1).long()
    assignment_of.scatter_(1, sent_LA, (token * top_k + choice).int().expand(layers, -1, -1).flatten(1))
    slots = torch.full((layers, (bound + 1) * top_k), -1, dtype=torch.int16, device=device)
    slots.scatter_(1, (row_LTK.long() * top_k + choice).flatten(1), slot_LTK.flatten(1))

    by_place = choices[:, :cells].view(layers, num_ranks, tokens)
    rows = visited[:, :cells].view(layers, num_ranks, tokens).sum(2, dtype=torch.int32)
    offsets = torch.cat([rows.new_zeros(layers, 1), rows.cumsum(1, dtype=torch.int32)], 1)
    most = by_place.amax(2) if tokens else torch.zeros_like(rows)
    counts = torch.stack([rows, most, by_place.sum(2, dtype=torch.int32)], 2)
    by_rank = torch.cat([counts[:, :me], counts[:, -1:], counts[:, me:-1]], 1)
    return SendTables(
        assignment_of=assignment_of[:, :bound],
        slots=slots.view(layers, bound + 1, top_k)[:, :bound],
        position_of=torch.where(first, row_LTK, -1).int(),
        offsets=offsets,
        counts=by_rank,
    )


@dataclass(frozen=True)
class Sizes:
    """What the host knows of one layer: rows to and from each rank, and how many choices come with those it gets.

    `places`: the most choices that one received row has here. `assignments`: all of them; `own_assignments`: those of
    rows that stay on this rank.
    """

    send_counts: Sequence[int]
    receive_counts: Sequence[int]
    places: int
    assignments: int
    own_assignments: int


def sizes_of_layers(sent_LR3: np.ndarray, received_RL3: np.ndarray, rank: int) -> list[Sizes]:
    """From the counts that `rank` sends and those that it got from every rank, int [R, L, 3]."""
    rows_LR, most_LR, choices_LR = received_RL3.transpose(2, 1, 0)
    most, choices, own = most_LR.max(1).clip(min=1).tolist(), choices_LR.sum(1).tolist(), choices_LR[:, rank].tolist()
    sent, received = sent_LR3[:, :, 0].tolist(), rows_LR.tolist()
    return [Sizes(*of_layer) for of_layer in zip(sent, received, most, choices, own, strict=True)]
