"""One exchange of rows between the ranks of a group, there and back: packed, sent, received, and added up.

A token travels to a rank of the group once, in one payload. Rows that stay on this rank do not travel and are not
copied: every buffer holds the rows that come, then those that stay, then those that leave. The first two parts are what
is received, the last two what is sent, and on the way back the other way round.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...payload import PayloadLayout
from ..comm.collectives import Comm, Exchange
from .buffers import Buffers, Rows, Shape
from .tables import HopSizes, LayerTables


class Flight(NamedTuple):
    """Rows on their way."""

    exchange: Exchange
    rows: Rows

    def own(self) -> Tensor:
        """The rows that stay on this rank. They are there at once."""
        return self.rows.here[self.rows.come.shape[0] :]

    def others(self) -> Tensor:
        """Wait for the rows of other ranks: in the order of ranks."""
        self.exchange.wait()
        return self.rows.come

    def all(self) -> Tensor:
        """Wait for all rows: those of other ranks, then those that stay."""
        self.exchange.wait()
        return self.rows.here


class Hop:
    """The rows of one (layer, micro-batch) in one group.

    Args:
        tables: of the tokens that are here. Their ranks are those of the group.
        sizes: rows to and from each rank of the group.
        where: "layer l, micro-batch m", for errors.
        name: put before the names of the buffers that are used, which another hop uses at the same time.
    """

    def __init__(self, comm: Comm, buffers: Buffers, tables: LayerTables, sizes: HopSizes, where: str, name: str = ""):
        self._comm, self._buffers, self._where, self._name = comm, buffers, where, name
        self._tables, self._send, self._device = tables, tables.send, tables.slots.device
        self._top_k = self._send.top_k
        rank = comm.rank
        self.own = sizes.send[rank]  # rows that stay here
        self._leave, self._come = list(sizes.send), list(sizes.receive)
        self._leave[rank] = self._come[rank] = 0
        self.away, self.come = sum(self._leave), sum(self._come)
        self._combined: Rows | None = None  # where partial results are being written

    def prepare(self, hidden: int, dtype: torch.dtype, out: torch.dtype) -> None:
        """Make the views that a layer will ask for, with rows of `hidden` elements and partial sums of `out`."""
        gates = torch.promote_types(dtype, torch.float32)
        self._rows("payload", _layout(hidden, self._top_k, dtype, gates, True)[1], torch.uint8)
        self._rows("combined", hidden, out)
        if torch.is_grad_enabled():
            self._rows("rows", hidden, dtype)
            self._rows("combined", _layout(hidden, self._top_k, out, gates, False)[1], torch.uint8)

    def layout(self, x_TH: Tensor, weights_TK: Tensor) -> PayloadLayout:
        """The layout of the payload in which these tokens travel."""
        weights_dtype = torch.promote_types(weights_TK.dtype, torch.float32)
        return _layout(x_TH.shape[1], self._top_k, x_TH.dtype, weights_dtype, True)[0]

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> Flight:
        """Begin to send tokens, with gate weights and slots, as payload rows."""
        weights_dtype = torch.promote_types(weights_TK.dtype, torch.float32)
        _, row_bytes = _layout(x_TH.shape[1], self._top_k, x_TH.dtype, weights_dtype, True)
        again = kind == "redispatch"  # which is under way beside backward's dispatch
        rows = self._rows("payload again" if again else "payload", row_bytes, torch.uint8)
        ops.pack_payload(x_TH.contiguous(), weights_TK.contiguous(), self._tables.slots, self._send, rows.sent)
        return self._fly(rows, kind)

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> Flight:
        """Begin to send rows alone: their slots and gate weights are at the receivers already."""
        rows = self._rows("rows", rows_TH.shape[1], rows_TH.dtype)
        torch.index_select(rows_TH, 0, self._tables.token_of, out=rows.sent)
        return self._fly(rows, kind)

    def room(self, width: int, dtype: torch.dtype) -> Tensor:
        """Where to write partial results [rows, width]: of the rows that came, then of those that stayed."""
        self._combined = rows = self._rows("combined", width, dtype)
        return rows.here

    @property
    def written(self) -> tuple[int, torch.dtype]:
        """The width and dtype of what is being written to `room`."""
        assert self._combined is not None
        return self._combined.here.shape[1], self._combined.here.dtype

    def combine(self, kind: str, out_TH: Tensor | None = None) -> Tensor:
        """Send what was written to `room` back to its tokens, where it is added up in the order of k: [T, H]."""
        rows, self._combined = self._combined, None
        assert rows is not None
        self._back(rows, kind)
        return ops.unpermute(rows.sent, None, self._send, out=out_TH)

    def combine_gradients(
        self, parts: Sequence[tuple[Tensor, Tensor]], kind: str, weights_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Send the gradients of rows and of their gate weights back to the tokens, added up there: [T, H] and [T, K].

        Args:
            parts: one after another they are the rows that came, then those that stayed.
            weights_dtype: of the gate weights' gradients that are returned.
        """
        dx, dweights = parts[0]
        layout, row_bytes = _layout(dx.shape[1], self._top_k, dx.dtype, dweights.dtype, False)
        rows = self._rows("combined", row_bytes, torch.uint8)
        into = [rows.here] if len(parts) == 1 else rows.here.split([part.shape[0] for part, _ in parts])
        for (part, dweight), there in zip(parts, into, strict=True):
            ops.pack_gradients(part.contiguous(), dweight.contiguous(), there)
        self._back(rows, kind)
        return ops.unpack_gradients(rows.sent, self._send, layout, weights_dtype=weights_dtype)

    def _rows(self, name: str, width: int, dtype: torch.dtype) -> Rows:
        shape = Shape(self.come, self.own, self.away, width, dtype)
        return self._buffers.take(self._name + name, self._device, shape)

    def _fly(self, rows: Rows, kind: str) -> Flight:
        phase = f"{kind} of {self._where}"
        return Flight(self._comm.start(rows.leave, self._leave, self._come, kind, phase, rows.come), rows)

    def _back(self, rows: Rows, kind: str) -> None:
        phase = f"{kind} of {self._where}"
        self._comm.start(rows.come, self._come, self._leave, kind, phase, rows.leave).wait()


@functools.cache
def _layout(
    hidden: int, top_k: int, dtype: torch.dtype, weights_dtype: torch.dtype, has_slots: bool
) -> tuple[PayloadLayout, int]:
    """A layout, and the bytes of its rows."""
    layout = PayloadLayout(hidden, top_k, dtype, weights_dtype, has_slots)
    return layout, layout.row_bytes


def rows_of_hop(sizes: HopSizes, rank: int) -> int:
    """How many rows a buffer holds on this rank of the group: those that come, stay and leave."""
    return sum(sizes.send) + sum(sizes.receive) - sizes.send[rank]


def buffer_bytes(
    rows: int, hidden: int, top_k: int, dtype: torch.dtype, out: torch.dtype, *, redispatch: bool
) -> dict[str, int]:
    """Bytes of each buffer, by its name, that a hop of so many rows of `hidden` elements needs. Partial sums are `out`.

    Gate weights travel in fp32, or in float64 beside float64.
    """
    gates = torch.promote_types(dtype, torch.float32)
    forward = rows * PayloadLayout(hidden, top_k, dtype, gates).row_bytes
    used = {"payload": forward, "combined": rows * hidden * out.itemsize}
    if torch.is_grad_enabled():
        backward = PayloadLayout(hidden, top_k, out, gates, has_slots=False).row_bytes
        used |= {"rows": rows * hidden * dtype.itemsize, "combined": rows * backward}
        if redispatch:
            used["payload again"] = forward
    return used
