"""The way of a layer's rows: from their tokens to the ranks that compute them, and partial results back.

A token travels to a rank once, in one payload. With `overlap`, the rows that stay on their rank are a chunk of their
own, computed while the others are on their way.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...payload import PayloadLayout
from ...schedule import Schedule
from ..comm.collectives import Comm
from ..session import RuntimeOptions
from .buffers import Buffers
from .tables import SendTables, Sizes


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

    def pick(self, values_RK: Tensor) -> Tensor:
        """[rows, K] -> [rows, places]."""
        return values_RK if self.columns is None else values_RK.gather(1, self.columns)

    def spread(self, values_RP: Tensor) -> Tensor:
        """[rows, places] -> [rows, K], zeros where a choice is elsewhere."""
        if self.columns is None:
            return values_RP
        return values_RP.new_zeros(len(values_RP), self.top_k).scatter_(1, self.columns, values_RP)


def make_group(slots_RK: Tensor, num_slots: int, places: int, assignments: int) -> Group:
    """From the slot of each row's choices, int16, -1 where a choice is on another rank.

    Args: places, assignments: as in `Sizes`.
    """
    top_k = slots_RK.shape[1]
    columns = None
    if places < top_k and slots_RK.device.type == "cpu":
        columns = (slots_RK < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :places]
        slots_RK = slots_RK.gather(1, columns)
    return Group(ops.build_schedule(slots_RK.contiguous(), num_slots, num_rows=assignments), columns, top_k)


@dataclass
class Chunk:
    """Rows that are computed together: what came with them, and who is computed with whom.

    `x` [rows, H], `weights` [rows, places].
    """

    group: Group
    x: Tensor
    weights: Tensor


class TokenPath:
    """The rows of one (layer, micro-batch).

    Args:
        tables: of some layers, for the model's input; `layer` is this one's place among them.
        num_slots: slots of this rank that rows may visit.
        where: "layer l, micro-batch m", for errors.
    """

    def __init__(
        self,
        comm: Comm,
        buffers: Buffers,
        tables: SendTables,
        layer: int,
        sizes: Sizes,
        num_slots: int,
        where: str,
        overlap: bool = False,
    ):
        self._comm, self._buffers, self._where, self._sizes = comm, buffers, where, sizes
        self._num_slots, self._overlap = num_slots, overlap
        sent = sum(sizes.send_counts)
        self.num_tokens, self.top_k = tables.position_of.shape[1:]
        self._send = Schedule(tables.offsets[layer], tables.assignment_of[layer, :sent], tables.position_of[layer])
        self._slots = tables.slots[layer, :sent]
        self._token_of_sent = torch.div(self._send.assignment_of, self.top_k, rounding_mode="floor")
        self._stay = sizes.send_counts[comm.rank]  # rows that stay here are sent last, and received last
        self._leave = [0 if rank == comm.rank else count for rank, count in enumerate(sizes.send_counts)]
        self._come = [0 if rank == comm.rank else count for rank, count in enumerate(sizes.receive_counts)]
        self.groups: dict[int, Group] = {}  # of each chunk; there once a dispatch has arrived

    @property
    def assignments(self) -> int:
        """How many (row, expert) pairs this rank computes."""
        return self._sizes.assignments

    @property
    def received(self) -> int:
        """Rows that this rank computes."""
        return sum(self._come) + self._stay

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> list[Callable[[], Chunk]]:
        """Begin to send tokens to the ranks that compute them; what arrives, as chunks to be waited for in turn."""
        layout = PayloadLayout(x_TH.shape[1], self.top_k, x_TH.dtype, weights_TK.dtype)
        away = sum(self._leave)
        suffix = " again" if kind == "redispatch" else ""  # which is under way beside backward's dispatch
        send = self._take(f"send{suffix}", (away + self._stay, layout.row_bytes), x_TH, torch.uint8)
        ops.pack_payload(x_TH.contiguous(), weights_TK.contiguous(), self._slots, self._send, send)
        received = self._take(f"received{suffix}", (self.received, layout.row_bytes), x_TH, torch.uint8)
        come = sum(self._come)
        exchange = self._comm.start(
            send[:away], self._leave, self._come, kind, f"{kind} of {self._where}", received[:come]
        )

        def arrive() -> Chunk:
            exchange.wait()
            if self._overlap:
                return self._chunk(layout, received[:come], 1)
            received[come:].copy_(send[away:])
            return self._chunk(layout, received, 0)

        if self._overlap:
            return [lambda: self._chunk(layout, send[away:], 0), arrive]
        return [arrive]

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> list[Callable[[], Tensor]]:
        """The same for rows alone, whose slots and gate weights are there already: [rows, H] of every chunk."""
        away, come = sum(self._leave), sum(self._come)
        send = self._take("send rows", (away + self._stay, rows_TH.shape[1]), rows_TH)
        torch.index_select(rows_TH, 0, self._token_of_sent, out=send)
        received = self._take("received rows", (self.received, rows_TH.shape[1]), rows_TH)
        exchange = self._comm.start(
            send[:away], self._leave, self._come, kind, f"{kind} of {self._where}", received[:come]
        )

        def arrive() -> Tensor:
            exchange.wait()
            if self._overlap:
                return received[:come]
            received[come:].copy_(send[away:])
            return received

        return [lambda: send[away:], arrive] if self._overlap else [arrive]

    def combine(self, partials: Sequence[Tensor], kind: str) -> Tensor:
        """Partial results [rows, H] of every chunk back to their tokens and added up: [T, H]."""
        rows = partials[-1]
        come, away = sum(self._come), sum(self._leave)
        into = self._take("combined", (away + self._stay, *rows.shape[1:]), rows)
        exchange = self._comm.start(rows[:come], self._come, self._leave, kind, f"{kind} of {self._where}", into[:away])
        into[away:].copy_(partials[0] if self._overlap else rows[come:])
        exchange.wait()
        return ops.unpermute(into, None, self._send)

    def combine_gradients(self, partials: Sequence[tuple[Tensor, Tensor]], kind: str) -> tuple[Tensor, Tensor]:
        """The same for (gradients of rows [rows, H], of their gate weights [rows, K]): [T, H] and [T, K]."""
        dx, dweights = partials[-1]
        layout = PayloadLayout(dx.shape[1], self.top_k, dx.dtype, dweights.dtype, has_slots=False)
        rows = self._take("returned", (sum(len(part) for part, _ in partials), layout.row_bytes), dx, torch.uint8)
        start = 0
        for part, dweight in reversed(partials):  # what came from other ranks first
            ops.pack_gradients(part.contiguous(), dweight.contiguous(), rows[start : start + len(part)])
            start += len(part)
        come, away = sum(self._come), sum(self._leave)
        into = self._take("combined", (away + self._stay, layout.row_bytes), dx, torch.uint8)
        exchange = self._comm.start(rows[:come], self._come, self._leave, kind, f"{kind} of {self._where}", into[:away])
        into[away:].copy_(rows[come:])
        exchange.wait()
        return ops.unpack_gradients(into, self._send, layout)

    def _chunk(self, layout: PayloadLayout, rows: Tensor, index: int) -> Chunk:
        x, weights, slots = ops.unpack_payload(rows, layout)
        group = self._group(slots, index)
        return Chunk(group, x, group.pick(weights))

    def _group(self, slots_RK: Tensor, index: int) -> Group:
        """The same rows come with every pass over a micro-batch: their schedules are made once."""
        if index not in self.groups:
            assignments = self._sizes.assignments
            if self._overlap:
                own = self._sizes.own_assignments
                assignments = assignments - own if index else own
            self.groups[index] = make_group(slots_RK, self._num_slots, self._sizes.places, assignments)
        return self.groups[index]

    def _take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._buffers.take(name, shape, like if dtype is None else like.new_empty(0, dtype=dtype))


def reserve(
    buffers: Buffers,
    sizes: Sequence[Sizes],
    top_k: int,
    rows: Sequence[tuple[int, torch.dtype]],
    options: RuntimeOptions,
    device: torch.device,
) -> None:
    """Make room for the rows of every layer of a micro-batch, so that none of them has to.

    The buffers are those that `TokenPath` takes; gate weights in the dtype in which routers give them.

    Args:
        rows: (elements, dtype) of a token's row in every layer.
    """
    needed = Counter[str]()
    for of_layer, (hidden, dtype) in zip(sizes, rows, strict=True):
        gates = torch.promote_types(dtype, torch.float32)
        out = options.combine_dtype or dtype
        sent, received = sum(of_layer.send_counts), sum(of_layer.receive_counts)
        forward = PayloadLayout(hidden, top_k, dtype, gates).row_bytes
        backward = PayloadLayout(hidden, top_k, out, gates, has_slots=False).row_bytes
        used = {"send": sent * forward, "received": received * forward, "combined": sent * hidden * out.itemsize}
        if torch.is_grad_enabled():
            used |= {"send rows": sent * hidden * dtype.itemsize, "received rows": received * hidden * dtype.itemsize}
            used |= {"returned": received * backward, "combined": sent * backward}
            if options.redispatch:
                used |= {"send again": sent * forward, "received again": received * forward}
        for name, size in used.items():
            needed[name] = max(needed[name], size)
    buffers.reserve(needed, device)
