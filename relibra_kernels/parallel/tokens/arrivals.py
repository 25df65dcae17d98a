"""What a rank receives in the layers of a recorded micro-batch, known before the first one runs.

Ranks tell each other the slots of all rows of all layers, in one exchange when the micro-batch opens. Tables of what
arrives are then made for all layers together, and a layer makes none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..comm.collectives import Comm
from ..comm.devices import upload
from .chunks import Group, make_groups
from .tables import HopSizes, LayerTables, SendTables, Sizes


class Arrivals(NamedTuple):
    """Of one layer, by chunk. `groups`: its rows. `relayed`: what of them is handed on, with a second hop."""

    groups: dict[int, Group]
    relayed: dict[int, LayerTables]


def exchange_slots(comm: Comm, tables: SendTables, hops: Sequence[HopSizes], what: str) -> Tensor:
    """int16 [rows, K]: the slots of what each hop brings, one after another: rows that come, by rank, and those that
    stay. Collective, and nothing waits for the device.

    Args:
        hops: of each of the tables. what: goes on, for errors.
    """
    me = comm.rank
    leave_PR, come_PR = (np.array(counts, np.int64) for counts in zip(*hops, strict=True))
    stay_P = leave_PR[:, me].copy()
    leave_PR[:, me] = come_PR[:, me] = 0
    stay, away, come = int(stay_P.sum()), int(leave_PR.sum()), int(come_PR.sum())
    first_P = np.arange(len(hops)) * tables.slots.shape[1]
    first_PR = (first_P + stay_P)[:, None] + _before(leave_PR, 1)  # those that stay are the first of a table
    came_RP = _before(come_PR.T.reshape(-1), 0).reshape(-1, len(hops))
    begins = [first_PR.T.reshape(-1), first_P, np.c_[came_RP.T, come + _before(stay_P, 0)].reshape(-1)]
    lengths = [leave_PR.T.reshape(-1), stay_P, np.c_[come_PR, stay_P].reshape(-1)]
    rows = rows_of_parts(np.concatenate(begins), np.concatenate(lengths), tables.slots.device)
    by_rank, by_part = rows.split([away + stay, come + stay])
    sent = tables.slots.flatten(0, 1)[by_rank]
    got = sent.new_empty(come + stay, sent.shape[1])
    out, into = sent[:away].view(torch.uint8), got[:come].view(torch.uint8)  # gloo takes no int16
    counts = leave_PR.sum(0).tolist(), come_PR.sum(0).tolist()
    exchange = comm.start(out, *counts, "slots", f"the exchange of slots of {what}", into)
    got[come:] = sent[away:]
    exchange.wait()
    return got[by_part]


def chunks_of_layers(hops: Sequence[HopSizes], rank: int, in_two: bool) -> list[list[tuple[int, int]]]:
    """Of every layer, (chunk, its rows) as they lie one after another where `exchange_slots` has them."""
    stay = [hop.receive[rank] for hop in hops]
    every = [sum(hop.receive) for hop in hops]
    if in_two:
        return [[(1, rows - own), (0, own)] for own, rows in zip(stay, every, strict=True)]
    return [[(0, rows)] for rows in every]


def groups_of_layers(
    slots_RK: Tensor, chunks: Sequence[Sequence[tuple[int, int]]], num_slots: int, sizes: Sequence[Sizes]
) -> list[dict[int, Group]]:
    """Of every layer, the rows of each chunk by their slots.

    Args:
        chunks: (chunk, its rows) of every layer, in the order of the slots.
    """
    in_two = len(chunks[0]) > 1 if chunks else False
    rows = [count for of_layer in chunks for _, count in of_layer]
    assignments = [
        of_layer.of_chunks(in_two)[index] for of_layer, each in zip(sizes, chunks, strict=True) for index, _ in each
    ]
    places = max((of_layer.places for of_layer in sizes), default=1)
    groups = iter(make_groups(slots_RK, rows, num_slots, places, assignments))
    return [{index: next(groups) for index, _ in of_layer} for of_layer in chunks]


def rows_of_parts(first: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tensor:
    """int64: as many numbers of each part as it is long, from its first one on."""
    total = int(lengths.sum())
    begin, count = upload(np.stack([first - _before(lengths, 0), lengths]), device)
    return begin.repeat_interleave(count, output_size=total) + torch.arange(total, device=device)


def _before(counts: np.ndarray, axis: int) -> np.ndarray:
    return counts.cumsum(axis) - counts
