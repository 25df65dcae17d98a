"""The transport of one hop: a token travels straight to every rank that computes some of its choices, once to each."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..comm.collectives import Comm
from .arrivals import Arrivals, chunks_of_layers, exchange_slots, groups_of_layers
from .buffers import Buffers
from .chunks import Chunk, Chunks, Group
from .destinations import Destinations
from .hop import Hop, rows_of_hop
from .tables import HopSizes, LayerTables, SendTables, Sizes, send_tables


class OneHop:
    """A `Transport`.

    Args:
        experts: the expert-parallel group. host: the same ranks, for what hosts tell each other.
    """

    name = "one"

    def __init__(self, experts: Comm, host: Comm):
        self.host, self.buffers = host, Buffers()
        self._experts = experts

    def tables(self, destinations: Destinations) -> SendTables:
        return send_tables(destinations, self._experts.size, self._experts.rank)

    def messages(self, counts_LC: np.ndarray) -> list[np.ndarray]:
        by_rank = counts_LC.reshape(len(counts_LC), self._experts.size, 3).transpose(1, 0, 2)
        return list(by_rank.astype(np.int64).reshape(self._experts.size, -1))

    def sizes(self, counts_LC: np.ndarray, received: Sequence[np.ndarray]) -> list[Sizes]:
        ranks, rank = self._experts.size, self._experts.rank
        got_RL3 = np.stack(received).reshape(ranks, len(counts_LC), 3)
        rows_LR, most_LR, choices_LR = got_RL3.transpose(2, 1, 0)
        most = most_LR.max(1).clip(min=1).tolist()
        own = choices_LR[:, rank]
        chunks = zip(own.tolist(), (choices_LR.sum(1) - own).tolist(), strict=True)
        sent = counts_LC.reshape(-1, ranks, 3)[:, :, 0].tolist()
        of_layers = zip(sent, rows_LR.tolist(), most, chunks, strict=True)
        return [Sizes((HopSizes(to, come),), places, both) for to, come, places, both in of_layers]

    def hops(self, sizes: Sizes, _overlap: bool) -> list[tuple[str, int]]:
        return [("", rows_of_hop(sizes.hops[0], self._experts.rank))]

    def arrivals(
        self, tables: SendTables, sizes: Sequence[Sizes], num_slots: int, overlap: bool, what: str
    ) -> list[Arrivals]:
        hops = [of_layer.hops[0] for of_layer in sizes]
        slots = exchange_slots(self._experts, tables, hops, what)
        chunks = chunks_of_layers(hops, self._experts.rank, overlap)
        groups = groups_of_layers(slots, chunks, num_slots, sizes)
        return [Arrivals(of_layer, {}) for of_layer in groups]

    def path(
        self,
        tables: LayerTables,
        sizes: Sizes,
        num_slots: int,
        where: str,
        overlap: bool,
        arrivals: Arrivals | None = None,
    ) -> "OneHopPath":
        hop = Hop(self._experts, self.buffers, tables, sizes.hops[0], where)
        return OneHopPath(hop, Chunks(num_slots, sizes, overlap, arrivals and arrivals.groups), overlap)


class OneHopPath:
    """A `TokenPath`. With `overlap`, the rows that stay on their rank are the first of two chunks."""

    def __init__(self, hop: Hop, chunks: Chunks, overlap: bool):
        self._hop, self._chunks, self._overlap = hop, chunks, overlap

    @property
    def groups(self) -> dict[int, Group]:
        return self._chunks.groups

    def prepare(self, hidden: int, dtype: torch.dtype, out: torch.dtype) -> None:
        self._hop.prepare(hidden, dtype, out)

    @property
    def assignments(self) -> int:
        return self._chunks.assignments

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> Sequence[Callable[[], Chunk]]:
        flight, layout = self._hop.dispatch(x_TH, weights_TK, kind), self._hop.layout(x_TH, weights_TK)
        take = [flight.own, flight.others] if self._overlap else [flight.all]

        def arrive(index: int) -> Chunk:
            return self._chunks.chunk(layout, take[index](), index)

        return [partial(arrive, index) for index in range(len(take))]

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> Sequence[Callable[[], Tensor]]:
        flight = self._hop.dispatch_rows(rows_TH, kind)
        return [flight.own, flight.others] if self._overlap else [flight.all]

    def room(self, index: int, width: int, dtype: torch.dtype) -> Tensor:
        whole = self._hop.room(width, dtype)
        if not self._overlap:
            return whole
        return whole[: self._hop.come] if index else whole[self._hop.come :]

    def combine(self, kind: str) -> Tensor:
        return self._hop.combine(kind)

    def combine_gradients(
        self, partials: Sequence[tuple[Tensor, Tensor]], kind: str, weights_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self._hop.combine_gradients(partials[::-1], kind, weights_dtype)
