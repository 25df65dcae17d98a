"""What a rank sends and receives in a layer: rows, slots and counts, made on the device from destinations.

A token travels to a rank once, however many of its experts are there. Rows that are sent are ordered by destination,
then by token; those that stay on their rank come first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...schedule import Schedule
from ..comm.devices import upload
from .destinations import Destinations

CELLS = 1 << 25  # (layer, rank, token) cells that are looked at together: 9 bytes of memory each, on the way


class LayerTables(NamedTuple):
    """What one rank sends in one layer, N rows: views of `SendTables`.

    `send`: rows by the first choice that goes with them. `slots` int16 [N, K]. `token_of` int32 [N].
    """

    send: Schedule
    slots: Tensor
    token_of: Tensor


@dataclass(frozen=True)
class SendTables:
    """What one rank sends in some layers L, T tokens or rows each. On the device.

    `assignment_of` int32 [L, T * min(K, R) + 1]: the first choice, as t * K + k, of each row that is sent. Unused at
        the end.
    `token_of` int32, of its shape: the token t alone.
    `slots` int16 [L, T * min(K, R) + 1, K]: the slot on its destination of each of the row's choices, -1 for those of
        other ranks.
    `position_of` int32 [L, T, K]: the sent row whose first choice this is, else -1.
    `offsets` int32 [L, R + 1]: where the rows for each destination begin, in the order in which they are sent.
    `counts` int32 [L, C]: what hosts are told. Of `send_tables` [L, R * 3], by rank: rows, the most choices that one of
        them has there, and all those choices.
    """

    assignment_of: Tensor
    token_of: Tensor
    slots: Tensor
    position_of: Tensor
    offsets: Tensor
    counts: Tensor

    def of_layers(self, hops: "Sequence[HopSizes]", tokens: Sequence[int] | None = None) -> list[LayerTables]:
        """The tables of every layer, cut to the rows that it sends.

        Args:
            tokens: how many each has, where that differs.
        """
        width = self.assignment_of.shape[1]
        sizes = [size for hop in hops for size in (sum(hop.send), width - sum(hop.send))]
        flat = self.assignment_of.flatten(), self.token_of.flatten(), self.slots.flatten(0, 1)
        assignment_of, token_of, slots = (table.split(sizes)[::2] for table in flat)
        positions: Sequence[Tensor] = self.position_of.unbind()
        if tokens is not None:
            positions = [table[:count] for table, count in zip(positions, tokens, strict=True)]
        schedules = map(Schedule, self.offsets.unbind(), assignment_of, positions)
        return [LayerTables(*parts) for parts in zip(schedules, slots, token_of, strict=True)]

    def of_tokens(self, rows_T: Tensor, token_of_row: Tensor) -> "SendTables":
        """These tables by the tokens of the model's input instead of the rows of the trace.

        Args:
            rows_T: int64 [tokens], -1 for padding. token_of_row: int64 [rows + 1], the last one for row -1.
        """
        top_k = self.position_of.shape[2]
        nowhere = self.position_of.new_full((len(self.position_of), 1, top_k), -1)
        token_LN = token_of_row[self.token_of.long()]
        return SendTables(
            assignment_of=(token_LN * top_k + (self.assignment_of - self.token_of * top_k)).int(),
            token_of=token_LN.int(),
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
    ranks = np.arange(num_ranks)
    order = np.r_[np.where(ranks < me, ranks + 1, np.where(ranks == me, 0, ranks)), num_ranks]  # of -1: the last
    place = upload(order, device)[rank_LTK]
    token = torch.arange(tokens, device=device)[:, None]
    cell_LTK = place * tokens + token
    choices = _choices(cell_LTK, cells + tokens)
    visited = choices > 0
    row_of_cell = visited.cumsum(1, dtype=torch.int32) - 1
    bound = tokens * min(top_k, num_ranks)
    row_LTK = row_of_cell.gather(1, cell_LTK.flatten(1)).view_as(rank_LTK).clamp(max=bound)  # what goes nowhere is last
    earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=device).tril(-1)
    again = ((place[..., :, None] == place[..., None, :]) & earlier).any(-1)
    other = again | (place == num_ranks)  # choices with which no row goes

    choice = torch.arange(top_k, device=device)
    assignment_of = torch.zeros(layers, bound + 1, dtype=torch.int32, device=device)
    sent_LA = row_LTK.masked_fill(other, bound).flatten(1).long()
    assignment_of.scatter_(1, sent_LA, (token * top_k + choice).int().expand(layers, -1, -1).flatten(1))
    slots = torch.full((layers, (bound + 1) * top_k), -1, dtype=torch.int16, device=device)
    slots.scatter_(1, (row_LTK.long() * top_k + choice).flatten(1), slot_LTK.flatten(1))

    counts = _counts(choices[:, :cells].view(layers, num_ranks, tokens))
    rows = counts[:, :, 0]
    offsets = torch.cat([rows.new_zeros(layers, 1), rows.cumsum(1, dtype=torch.int32)], 1)
    by_rank = torch.cat([counts[:, 1 : me + 1], counts[:, :1], counts[:, me + 1 :]], 1)
    return SendTables(
        assignment_of=assignment_of,
        token_of=torch.div(assignment_of, top_k, rounding_mode="floor"),
        slots=slots.view(layers, bound + 1, top_k),
        position_of=row_LTK.masked_fill(other, -1).int(),
        offsets=offsets,
        counts=by_rank.flatten(1),
    )


def visits(rank_LTK: Tensor, num_ranks: int) -> Tensor:
    """int32 [L, R, 3]: `SendTables.counts` alone, from the rank of each assignment (-1: nowhere)."""
    layers, tokens, _ = rank_LTK.shape
    step = max(1, CELLS // max(1, num_ranks * tokens))
    parts = []
    for start in range(0, layers, step):
        part = rank_LTK[start : start + step]
        token = torch.arange(tokens, device=part.device)[:, None]
        choices = _choices(part % (num_ranks + 1) * tokens + token, (num_ranks + 1) * tokens)
        parts.append(_counts(choices[:, : num_ranks * tokens].view(len(part), num_ranks, tokens)))
    return torch.cat(parts)


def _choices(cell_LTK: Tensor, cells: int) -> Tensor:
    """int32 [L, cells]: how many assignments fall into each cell."""
    cell_LA = cell_LTK.flatten(1)
    choices = torch.zeros(len(cell_LA), cells, dtype=torch.int32, device=cell_LA.device)
    return choices.scatter_add_(1, cell_LA, torch.ones_like(cell_LA, dtype=torch.int32))


def _counts(choices_LRT: Tensor) -> Tensor:
    """int32 [L, R, 3] of choices of every token on each rank: rows, the most of one, all."""
    rows = (choices_LRT > 0).sum(2, dtype=torch.int32)
    most = choices_LRT.amax(2) if choices_LRT.shape[2] else torch.zeros_like(rows)
    return torch.stack([rows, most, choices_LRT.sum(2, dtype=torch.int32)], 2)


class HopSizes(NamedTuple):
    """Rows that one exchange takes to each rank of its group, and from each: integers of the host."""

    send: Sequence[int]
    receive: Sequence[int]


@dataclass(frozen=True)
class Sizes:
    """What the host knows of one layer.

    `hops`: of each exchange on a token's way. `places`: the most choices that one received row has here.
    `assignments`: all of them, as (those of the first chunk where there are two, the others).
    """

    hops: tuple[HopSizes, ...]
    places: int
    assignments: tuple[int, int]

    def of_chunks(self, in_two: bool) -> tuple[int, ...]:
        """Assignments of every chunk: of two, or of one."""
        return self.assignments if in_two else (sum(self.assignments),)
