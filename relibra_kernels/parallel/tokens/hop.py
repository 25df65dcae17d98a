"""One exchange of rows between the ranks of a group, there and back: packed, sent, received, and added up.

A token travels to a rank of the group once, in one payload. Rows that stay on this rank do not travel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...payload import PayloadLayout
from ...schedule import Schedule
from ..comm.collectives import Comm, Exchange
from .buffers import Buffers
from .tables import HopSizes, SendTables


@dataclass(frozen=True)
class Flight:
    """Rows on their way.

    Args:
        sent: those that left, then those that stay. received: room for as many as come, then for those that stay.
    """

    exchange: Exchange
    sent: Tensor
    received: Tensor
    stay: int

    def own(self) -> Tensor:
        """Those that stay: they are there at once."""
        return self.sent[len(self.sent) - self.stay :]

    def others(self) -> Tensor:
        """Those of other ranks, in the order of ranks."""
        self.exchange.wait()
        return self.received[: len(self.received) - self.stay]

    def all(self) -> Tensor:
        """Those of other ranks, then those that stay."""
        come = len(self.others())
        self.received[come:].copy_(self.own())
        return self.received


class Hop:
    """The rows of one (layer, micro-batch) in one group.

    Args:
        tables: of some layers, for the tokens that are here; `layer` is this one's place among them. Their ranks are
            those of the group.
        sizes: rows to and from each rank of the group.
        where: "layer l, micro-batch m", for errors.
        name: put before the names of the buffers that are used, which another hop uses at the same time.
    """

    def __init__(
        self,
        comm: Comm,
        buffers: Buffers,
        tables: SendTables,
        layer: int,
        sizes: HopSizes,
        where: str,
        name: str = "",
    ):
        self._comm, self._buffers, self._where, self._name = comm, buffers, where, name
        sent = sum(sizes.send)
        self._top_k = tables.position_of.shape[2]
        self._send = Schedule(tables.offsets[layer], tables.assignment_of[layer, :sent], tables.position_of[layer])
        self._slots = tables.slots[layer, :sent]
        self._token_of_sent = tables.token_of[layer, :sent]
        self._stay = sizes.send[comm.rank]  # rows that stay here are sent last, and received last
        self._leave = [0 if rank == comm.rank else count for rank, count in enumerate(sizes.send)]
        self._come = [0 if rank == comm.rank else count for rank, count in enumerate(sizes.receive)]
        self.away, self.come = sum(self._leave), sum(self._come)

    def layout(self, x_TH: Tensor, weights_TK: Tensor) -> PayloadLayout:
        """Of the payload in which these travel."""
        return PayloadLayout(x_TH.shape[1], self._top_k, x_TH.dtype, weights_TK.dtype)

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> Flight:
        """Begin to send tokens, with gate weights and slots, as payload rows."""
        layout = self.layout(x_TH, weights_TK)
        suffix = " again" if kind == "redispatch" else ""  # which is under way beside backward's dispatch
        send = self._take(f"send{suffix}", (self.away + self._stay, layout.row_bytes), x_TH, torch.uint8)
        ops.pack_payload(x_TH.contiguous(), weights_TK.contiguous(), self._slots, self._send, send)
        received = self._take(f"received{suffix}", (self.come + self._stay, layout.row_bytes), x_TH, torch.uint8)
        return self._fly(send, received, kind)

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> Flight:
        """The same for rows alone, whose slots and gate weights are there already."""
        send = self._take("send rows", (self.away + self._stay, rows_TH.shape[1]), rows_TH)
        torch.index_select(rows_TH, 0, self._token_of_sent, out=send)
        received = self._take("received rows", (self.come + self._stay, rows_TH.shape[1]), rows_TH)
        return self._fly(send, received, kind)

    def combine(self, others: Tensor, own: Tensor, kind: str) -> Tensor:
        """Partial results [rows, H] back to their tokens and added up, in the order of k: [T, H].

        Args:
            others: of rows that came. own: of those that stayed.
        """
        into = self._take("combined", (self.away + self._stay, *own.shape[1:]), own)
        return ops.unpermute(self._back(others, own, into, kind), None, self._send)

    def combine_gradients(self, parts: Sequence[tuple[Tensor, Tensor]], kind: str) -> tuple[Tensor, Tensor]:
        """The same for (gradients of rows [rows, H], of their gate weights [rows, K]): [T, H] and [T, K].

        Args:
            parts: one after another they are the rows that came, then those that stayed.
        """
        dx, dweights = parts[0]
        layout = PayloadLayout(dx.shape[1], self._top_k, dx.dtype, dweights.dtype, has_slots=False)
        rows = self._take("returned", (self.come + self._stay, layout.row_bytes), dx, torch.uint8)
        start = 0
        for part, dweight in parts:
            ops.pack_gradients(part.contiguous(), dweight.contiguous(), rows[start : start + len(part)])
            start += len(part)
        into = self._take("combined", (self.away + self._stay, layout.row_bytes), dx, torch.uint8)
        back = self._back(rows[: self.come], rows[self.come :], into, kind)
        return ops.unpack_gradients(back, self._send, layout)

    def _fly(self, send: Tensor, received: Tensor, kind: str) -> Flight:
        phase = f"{kind} of {self._where}"
        sent, into = send[: self.away], received[: self.come]
        return Flight(self._comm.start(sent, self._leave, self._come, kind, phase, into), send, received, self._stay)

    def _back(self, others: Tensor, own: Tensor, into: Tensor, kind: str) -> Tensor:
        phase = f"{kind} of {self._where}"
        exchange = self._comm.start(others, self._come, self._leave, kind, phase, into[: self.away])
        into[self.away :].copy_(own)
        exchange.wait()
        return into

    def _take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        like = like if dtype is None else like.new_empty(0, dtype=dtype)
        return self._buffers.take(self._name + name, shape, like)


def buffer_bytes(
    sizes: HopSizes, hidden: int, top_k: int, dtype: torch.dtype, out: torch.dtype, *, redispatch: bool
) -> dict[str, int]:
    """What a hop takes for rows of `hidden` elements, in a layer whose partial sums are `out`, by the buffer's name.

    Gate weights are in the dtype in which routers give them.
    """
    gates = torch.promote_types(dtype, torch.float32)
    sent, received = sum(sizes.send), sum(sizes.receive)
    forward = PayloadLayout(hidden, top_k, dtype, gates).row_bytes
    backward = PayloadLayout(hidden, top_k, out, gates, has_slots=False).row_bytes
    used = {"send": sent * forward, "received": received * forward, "combined": sent * hidden * out.itemsize}
    if torch.is_grad_enabled():
        used |= {"send rows": sent * hidden * dtype.itemsize, "received rows": received * hidden * dtype.itemsize}
        used |= {"returned": received * backward, "combined": sent * backward}
        if redispatch:
            used |= {"send again": sent * forward, "received again": received * forward}
    return used
