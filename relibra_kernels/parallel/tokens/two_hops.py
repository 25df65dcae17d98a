"""The transport of two hops: a token crosses to another node once, and is handed on inside it.

Out:   to the rank of the same place on every node that computes some of its choices (rails), then from there to those
       ranks. A token's own node is a node like the others, to which it has nothing to cross.
Back:  partial results are added up in the node, in the order of its ranks' choices, and cross once.

A rail is the ranks of one place, one on every node. Both hops are done by `hop.py`, in smaller groups. The first goes
between the ranks of a rail; what it calls a slot is (rank in the node, slot there) as one number. The second goes
between the ranks of a node; its tokens are the rows that the first brought.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...planner.errors import InputError
from ..comm.collectives import Comm
from .arrivals import Arrivals, chunks_of_layers, exchange_slots, groups_of_layers, rows_of_parts
from .buffers import Buffers
from .chunks import Chunk, Chunks, Group
from .destinations import Destinations
from .hop import Hop, rows_of_hop
from .tables import HopSizes, LayerTables, SendTables, Sizes, send_tables, visits

_INSIDE = "node {} "  # what names of buffers of the second hop begin with, for each chunk
_MOST = 1 << 15  # (rank, slot) pairs of a node that int16 holds


class TwoHops:
    """A `Transport`.

    Args:
        rail: the ranks of this one's place on every node. node: the ranks of this one's node.
        host: all ranks, node by node, for what hosts tell each other.
        slots: of a rank, home and replica.
    """

    name = "two"

    def __init__(self, rail: Comm, node: Comm, host: Comm, slots: int):
        if slots * node.size > _MOST:
            raise InputError(
                f"transport is 'two' for {node.size} ranks a node with {slots} slots each: more than {_MOST}, so it "
                "must be 'one'"
            )
        self.host, self.buffers = host, Buffers()
        self._rail, self._node = rail, node

    def tables(self, destinations: Destinations) -> SendTables:
        size = self._node.size
        rank = destinations.rank
        node = torch.div(rank, size, rounding_mode="floor")  # -1 stays
        place = (destinations.slot * size + rank % size).masked_fill(rank < 0, -1)
        tables = send_tables(Destinations(node, place.to(torch.int16)), self._rail.size, self._rail.rank)
        crossing = tables.counts.view(len(tables.counts), -1, 3)[:, :, 0]
        to_ranks = visits(destinations.rank, self._rail.size * size).flatten(1)
        return replace(tables, counts=torch.cat([to_ranks, crossing], 1))

    def messages(self, counts_LC: np.ndarray) -> list[np.ndarray]:
        """To every rank what it gets from this one's tokens; to those of the rail also what they are to hand on."""
        to_LR3, crossing_LN = self._counts(counts_LC)
        parts = list(to_LR3.transpose(1, 0, 2).reshape(self.host.size, -1))
        for node in range(self._rail.size):
            rows_LG = to_LR3[:, node * self._node.size :][:, : self._node.size, 0]
            relay = node * self._node.size + self._node.rank
            handed = np.concatenate([crossing_LN[:, node, None], rows_LG], 1)
            parts[relay] = np.concatenate([parts[relay], handed.reshape(-1)])
        return parts

    def sizes(self, counts_LC: np.ndarray, received: Sequence[np.ndarray]) -> list[Sizes]:
        layers, nodes, size, me = len(counts_LC), self._rail.size, self._node.size, self._rail.rank
        got_RL3 = np.stack([message[: layers * 3] for message in received]).reshape(-1, layers, 3)
        got_NGL3 = got_RL3.reshape(nodes, size, layers, 3)
        mine = received[self._node.rank :: size]
        handed_NLC = np.stack([message[layers * 3 :] for message in mine]).reshape(nodes, layers, 1 + size)
        come_NLG = got_NGL3[..., 0].transpose(0, 2, 1)
        go_NLG = handed_NLC[..., 1:]
        choices_NL = got_NGL3[..., 2].sum(1)
        most = got_RL3[..., 1].max(0).clip(min=1)
        crossing_LN = self._counts(counts_LC)[1]
        found = []
        for layer in range(layers):
            rail = HopSizes(crossing_LN[layer].tolist(), handed_NLC[:, layer, 0].tolist())
            go, come = go_NLG[:, layer], come_NLG[:, layer]
            near = HopSizes(go[me].tolist(), come[me].tolist())
            far = HopSizes((go.sum(0) - go[me]).tolist(), (come.sum(0) - come[me]).tolist())
            choices, own = int(choices_NL[:, layer].sum()), int(choices_NL[me, layer])
            found.append(Sizes((rail, near, far), int(most[layer]), (own, choices - own)))
        return found

    def hops(self, sizes: Sizes, overlap: bool) -> list[tuple[str, int]]:
        rail, *inside = self._exchanges(sizes, overlap)
        near = [(_INSIDE.format(index), rows_of_hop(hop, self._node.rank)) for index, hop in enumerate(inside)]
        return [("", rows_of_hop(rail, self._rail.rank)), *near]

    def arrivals(
        self, tables: SendTables, sizes: Sequence[Sizes], num_slots: int, overlap: bool, what: str
    ) -> list[Arrivals]:
        rails = [of_layer.hops[0] for of_layer in sizes]
        places = exchange_slots(self._rail, tables, rails, f"{what}, between nodes")
        chunks = chunks_of_layers(rails, self._rail.rank, overlap)
        order = [(layer, index, rows) for layer, each in enumerate(chunks) for index, rows in each]
        rows = [count for _, _, count in order]
        inside = [self._exchanges(sizes[layer], overlap)[1 + index] for layer, index, _ in order]
        handed_on = relay_tables(_of_one_size(places, rows), self._node)
        slots = exchange_slots(self._node, handed_on, inside, f"{what}, inside the node")
        arriving = iter(sum(hop.receive) for hop in inside)
        groups = groups_of_layers(slots, [[(i, next(arriving)) for i, _ in each] for each in chunks], num_slots, sizes)
        relayed = iter(handed_on.of_layers(inside, rows))
        return [
            Arrivals(of_layer, {i: next(relayed) for i, _ in each})
            for of_layer, each in zip(groups, chunks, strict=True)
        ]

    def path(
        self,
        tables: LayerTables,
        sizes: Sizes,
        num_slots: int,
        where: str,
        overlap: bool,
        arrivals: Arrivals | None = None,
    ) -> "TwoHopPath":
        rail, *inside = self._exchanges(sizes, overlap)
        across = Hop(self._rail, self.buffers, tables, rail, f"{where}, between nodes")
        chunks = Chunks(num_slots, sizes, overlap, arrivals and arrivals.groups)
        path = TwoHopPath(across, self._node, self.buffers, inside, chunks, f"{where}, inside the node")
        for index, of_chunk in (arrivals.relayed if arrivals else {}).items():
            path.hand_on(index, of_chunk)
        return path

    def _exchanges(self, sizes: Sizes, overlap: bool) -> list[HopSizes]:
        """Between nodes, then inside: of this node's tokens and of the others', or of all of them together."""
        rail, near, far = sizes.hops
        if overlap:
            return [rail, near, far]
        both = ([a + b for a, b in zip(*pair, strict=True)] for pair in zip(near, far, strict=True))
        return [rail, HopSizes(*both)]

    def _counts(self, counts_LC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [L, R, 3] and [L, N]: what goes to each rank in the end, and to each node."""
        wide = counts_LC.astype(np.int64)
        ranks = self.host.size
        return wide[:, : 3 * ranks].reshape(-1, ranks, 3), wide[:, 3 * ranks :]


class TwoHopPath:
    """A `TokenPath`. With `overlap`, tokens of this node are handed on and computed while the others cross.

    Args:
        across: the first hop. node: the group of the second.
        inside: the second hop of every chunk, in rows.
    """

    def __init__(
        self, across: Hop, node: Comm, buffers: Buffers, inside: Sequence[HopSizes], chunks: Chunks, where: str
    ):
        self._across, self._node, self._buffers, self._where = across, node, buffers, where
        self._sizes, self._chunks = inside, chunks
        self._overlap = len(inside) > 1
        self._inside: dict[int, Hop] = {}  # of each chunk; the same for every pass over a micro-batch

    @property
    def groups(self) -> dict[int, Group]:
        return self._chunks.groups

    def prepare(self, hidden: int, dtype: torch.dtype, out: torch.dtype) -> None:
        self._across.prepare(hidden, dtype, out)
        for hop in self._inside.values():
            hop.prepare(hidden, dtype, out)

    @property
    def assignments(self) -> int:
        return self._chunks.assignments

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> Sequence[Callable[[], Chunk]]:
        flight, layout = self._across.dispatch(x_TH, weights_TK, kind), self._across.layout(x_TH, weights_TK)
        take = [flight.own, flight.others] if self._overlap else [flight.all]

        def hand_on(index: int) -> Chunk:
            x, weights, places = ops.unpack_payload(take[index](), layout)
            if index not in self._inside:
                tables = relay_tables(places[None], self._node)
                self.hand_on(index, tables.of_layers([self._sizes[index]])[0])
            rows = self._inside[index].dispatch(x, weights, kind).all()
            return self._chunks.chunk(layout, rows, index)

        return [partial(hand_on, index) for index in range(len(take))]

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> Sequence[Callable[[], Tensor]]:
        flight = self._across.dispatch_rows(rows_TH, kind)
        take = [flight.own, flight.others] if self._overlap else [flight.all]

        def hand_on(index: int) -> Tensor:
            return self._inside[index].dispatch_rows(take[index](), kind).all()

        return [partial(hand_on, index) for index in range(len(take))]

    def room(self, index: int, width: int, dtype: torch.dtype) -> Tensor:
        return self._inside[index].room(width, dtype)

    def combine(self, kind: str) -> Tensor:
        come, room = self._across.come, self._across.room(*self._inside[0].written)
        parts = [room[come:], room[:come]] if self._overlap else [room]
        for index, part in enumerate(parts):
            self._inside[index].combine(kind, part)
        return self._across.combine(kind)

    def combine_gradients(
        self, partials: Sequence[tuple[Tensor, Tensor]], kind: str, weights_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        added = [
            self._inside[index].combine_gradients([part], kind, part[1].dtype) for index, part in enumerate(partials)
        ]
        return self._across.combine_gradients(added[::-1], kind, weights_dtype)

    def hand_on(self, index: int, tables: LayerTables) -> None:
        """Let the rows of a chunk be handed on so."""
        name = _INSIDE.format(index)
        self._inside[index] = Hop(self._node, self._buffers, tables, self._sizes[index], self._where, name)


def relay_tables(places_LRK: Tensor, node: Comm) -> SendTables:
    """How rows that came from other nodes are handed on: from the (rank, slot) that came with them.

    Args:
        places_LRK: int16, of some layers' rows; -1 where a choice is on another node.
    """
    rank = (places_LRK % node.size).masked_fill(places_LRK < 0, -1).long()
    slot = torch.div(places_LRK, node.size, rounding_mode="floor")  # -1 stays
    return send_tables(Destinations(rank, slot), node.size, node.rank)


def _of_one_size(places_RK: Tensor, rows: Sequence[int]) -> Tensor:
    """[parts, rows of the largest, K], -1 where a part has fewer."""
    most = max(rows, default=0)
    padded = places_RK.new_full((len(rows) * most, places_RK.shape[1]), -1)
    padded[rows_of_parts(np.arange(len(rows)) * most, np.array(rows, np.int64), places_RK.device)] = places_RK
    return padded.view(len(rows), most, places_RK.shape[1])
