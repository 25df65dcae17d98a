"""Rows that have arrived on this rank and are computed together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import ops
from ...payload import PayloadLayout
from ...schedule import Schedule
from .tables import Sizes


@dataclass(frozen=True)
class Group:
    """Rows on this rank that are computed together.

    Few of a token's K choices are on one rank. On a CPU the columns are packed: all rows have as many of them as the
    fullest row has choices here. On a GPU rows keep all K columns. An empty one costs a table entry there, but another
    number of columns would compile the kernels again.

    `schedule`: rows sorted by the slot on this rank. `columns` int64 [rows, places]: which of the K choices each place
    is; None where all are there.
    """

    schedule: Schedule
    columns: Tensor | None
    top_k: int

    def of_slots(self, num_slots: int) -> "Group":
        """The same where only the first slots are of any use: the others have no rows."""
        if num_slots == self.schedule.num_slots:
            return self
        return replace(self, schedule=replace(self.schedule, slot_offsets=self.schedule.slot_offsets[: num_slots + 1]))

    def pick(self, values_RK: Tensor) -> Tensor:
        """[rows, K] -> [rows, places]."""
        return values_RK if self.columns is None else values_RK.gather(1, self.columns)

    def spread(self, values_RP: Tensor) -> Tensor:
        """[rows, places] -> [rows, K], zeros where a choice is elsewhere."""
        if self.columns is None:
            return values_RP
        return values_RP.new_zeros(len(values_RP), self.top_k).scatter_(1, self.columns, values_RP)


def make_groups(
    slots_RK: Tensor, rows: Sequence[int], num_slots: int, places: int, assignments: Sequence[int]
) -> list[Group]:
    """From the slot of each row's choices, int16, -1 where a choice is on another rank.

    Args:
        rows: of each group, one after another. assignments: of each, and places, as in `Sizes`.
    """
    top_k = slots_RK.shape[1]
    columns: Sequence[Tensor | None] = [None] * len(rows)
    if places < top_k and slots_RK.device.type == "cpu":
        packed = (slots_RK < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :places]
        slots_RK, columns = slots_RK.gather(1, packed), packed.split(list(rows))
    schedules = ops.build_schedules(slots_RK.contiguous(), rows, num_slots, assignments)
    return [Group(schedule, of_rows, top_k) for schedule, of_rows in zip(schedules, columns, strict=True)]


@dataclass
class Chunk:
    """Rows that are computed together: what came with them, and who is computed with whom.

    `x` [rows, H], `weights` [rows, places].
    """

    group: Group
    x: Tensor
    weights: Tensor


class Chunks:
    """The chunks of one (layer, micro-batch). The same rows come with every pass over it: schedules are made once.

    Args:
        num_slots: slots of this rank that rows may visit.
        in_two: rows of this rank, or node, are a chunk of their own, before the others.
        groups: of the chunks, where they are known before the rows arrive.

    Attributes:
        groups: of each chunk, once it has arrived.
    """

    def __init__(self, num_slots: int, sizes: Sizes, in_two: bool, groups: Mapping[int, Group] | None = None):
        self._num_slots, self._places = num_slots, sizes.places
        self._assignments = sizes.of_chunks(in_two)
        self.groups = {index: group.of_slots(num_slots) for index, group in (groups or {}).items()}

    @property
    def assignments(self) -> int:
        """How many (row, expert) pairs this rank computes."""
        return sum(self._assignments)

    def chunk(self, layout: PayloadLayout, rows: Tensor, index: int) -> Chunk:
        """Take received payload rows apart."""
        x, weights, slots = ops.unpack_payload(rows, layout)
        if index not in self.groups:
            assignments = [self._assignments[index]]
            self.groups[index] = make_groups(slots, [len(slots)], self._num_slots, self._places, assignments)[0]
        group = self.groups[index]
        return Chunk(group, x, group.pick(weights))
