"""The way of planned rows: from their tokens to the ranks that compute them, and partial results back.

A token travels to a rank once. With `overlap`, the rows that stay on their rank are a chunk of their own, computed
while the others are on their way.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...nn import ReplicatedExperts
from ...schedule import Schedule
from ..comm.collectives import Comm, Exchange
from ..session import RuntimeOptions
from .buffers import Buffers
from .routes import SendRoute
from .tables import MicroBatchTables


@dataclass(frozen=True)
class Group:
    """Rows on this rank that are computed together.

    Of a token's K choices few are on one rank, so rows have as many places as the row with the most needs.

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


def make_group(slots_RK: np.ndarray, num_slots: int, device: torch.device) -> Group:
    """From the slot of each row's choices, int16, -1 where a choice is on another rank."""
    here = slots_RK >= 0
    places = max(1, int(here.sum(1).max(initial=0)))
    top_k = slots_RK.shape[1]
    columns = None
    if places < top_k:
        order = np.argsort(~here, axis=1, kind="stable")[:, :places]
        slots_RK = np.take_along_axis(slots_RK, order, 1)
        columns = torch.from_numpy(order).to(device)
    schedule = ops.backend(device).build_schedule(
        torch.from_numpy(slots_RK).to(device), num_slots, num_rows=int(np.count_nonzero(here))
    )
    return Group(schedule, columns, top_k)


@dataclass(frozen=True)
class Chunk:
    """A group on its way: `wait()` gives its values, one tensor for each that was dispatched."""

    group: Group
    wait: Callable[[], list[Tensor]]


class PlannedPath:
    """The rows of one (layer, micro-batch).

    Args:
        route: what this rank sends. receive_counts: int64 [R]. received_slots: int16 [received, K].
        token_of_row: int64 [rows of the trace], the position in the model's input of each, -1 where it is left out.
        num_tokens: of the model's input. num_slots: slots of this rank that rows may visit.
        where: "layer l, micro-batch m", for errors.
    """

    def __init__(
        self,
        comm: Comm,
        buffers: Buffers,
        route: SendRoute,
        receive_counts: np.ndarray,
        received_slots: np.ndarray,
        token_of_row: np.ndarray,
        num_tokens: int,
        num_slots: int,
        device: torch.device,
        where: str,
        overlap: bool = False,
    ):
        self._comm, self._buffers, self._where, self.device = comm, buffers, where, device
        me, send_counts = comm.rank, route.counts
        assignment_of = route.assignment_of
        slots = [received_slots]
        if overlap:  # own rows last
            start, stop = (int(edge) for edge in np.cumsum(send_counts)[me - 1 : me + 1]) if me else (0, send_counts[0])
            own = slice(start, stop)
            assignment_of = np.concatenate([assignment_of[:start], assignment_of[stop:], assignment_of[own]])
            first = int(receive_counts[:me].sum())
            mine = slice(first, first + int(receive_counts[me]))
            others = np.concatenate([received_slots[: mine.start], received_slots[mine.stop :]])
            slots = [received_slots[mine], others]
            away = np.arange(comm.size) != me
            send_counts, receive_counts = send_counts * away, receive_counts * away
        self._send_counts, self._receive_counts = send_counts.tolist(), receive_counts.tolist()
        self._sent = sum(self._send_counts)  # rows that leave; those after them stay
        top_k = received_slots.shape[1]
        self._send = _send_schedule(assignment_of, route.counts, token_of_row, num_tokens, top_k, device)
        self._token_of_sent = torch.div(self._send.assignment_of, top_k, rounding_mode="floor")
        self.groups = [make_group(part, num_slots, device) for part in slots]

    @property
    def assignments(self) -> int:
        """How many (row, expert) pairs this rank computes."""
        return sum(group.schedule.num_rows for group in self.groups)

    def dispatch(self, values: Sequence[Tensor], kind: str, keep: bool) -> list[Chunk]:
        """Begin to send tokens' values [T, ...] to the ranks that compute them.

        Args:
            keep: the received rows outlive the layer; otherwise the next dispatch overwrites them.
        """
        send = "send again" if kind == "redispatch" else "send"  # which is under way beside backward's dispatch
        own: list[Tensor] = []
        exchanges: list[Exchange] = []
        for i, value in enumerate(values):
            shape = value.shape[1:]
            sent = self._token_of_sent[: self._sent]
            rows = self._buffers.take(f"{send} {i}", (self._sent, *shape), value)
            torch.index_select(value, 0, sent, out=rows)
            size = (sum(self._receive_counts), *shape)
            into = value.new_empty(size) if keep else self._buffers.take(f"received {i}", size, value)
            counts = self._send_counts, self._receive_counts
            exchanges.append(self._comm.start(rows, *counts, _kind(kind, i), f"{kind} of {self._where}", into))
            if len(self.groups) > 1:
                own.append(value.index_select(0, self._token_of_sent[self._sent :]))
        received = partial(_wait_all, exchanges)
        waits: list[Callable[[], list[Tensor]]] = [received]
        if len(self.groups) > 1:
            waits.insert(0, lambda: own)
        return [Chunk(group, wait) for group, wait in zip(self.groups, waits, strict=True)]

    def combine(self, partials: Sequence[Sequence[Tensor]], kind: str) -> list[Tensor]:
        """Partial results, `partials[chunk][i]` [rows, ...], back to their tokens and added up: [T, ...] each."""
        *own, away = partials
        exchanges = []
        for i, rows in enumerate(away):
            total = self._send.num_rows
            into = self._buffers.take(f"combined {i}", (total, *rows.shape[1:]), rows)
            counts = self._receive_counts, self._send_counts
            phase = f"{kind} of {self._where}"
            exchanges.append((self._comm.start(rows, *counts, _kind(kind, i), phase, into[: self._sent]), into))
            if own:
                into[self._sent :].copy_(own[0][i])
        results = []
        for exchange, into in exchanges:
            exchange.wait()
            results.append(ops.unpermute(into, None, self._send))
        return results


def reserve(
    buffers: Buffers,
    tables: MicroBatchTables,
    rank: int,
    experts: Sequence[ReplicatedExperts],
    options: RuntimeOptions,
    device: torch.device,
) -> None:
    """Make room for the rows of every layer of a micro-batch, so that none of them has to.

    The buffers are those that `PlannedPath` takes; gate weights in the dtype in which routers give them.
    """
    needed: Counter[str] = Counter()
    for layer, (route, of_layer) in enumerate(zip(tables.routes, experts, strict=True)):
        leaving = np.arange(len(route.counts)) != rank if options.overlap else slice(None)
        sent, received = int(route.counts[leaving].sum()), int(tables.receive_counts[layer][leaving].sum())
        dtype = of_layer.down_proj.dtype
        row = of_layer.hidden_size * dtype.itemsize
        out_row = of_layer.hidden_size * (options.combine_dtype or dtype).itemsize
        gates = route.slots.shape[1] * torch.promote_types(dtype, torch.float32).itemsize
        total = int(route.counts.sum())
        sizes = {"send 0": sent * row, "send 1": sent * gates, "received 0": received * row}
        sizes |= {"combined 0": total * out_row, "combined 1": total * gates}
        if options.redispatch:
            sizes |= {"send again 0": sent * row, "send again 1": sent * gates}
        if options.redispatch or not any(weight.requires_grad for weight in of_layer.weights.tensors()):
            sizes["received 1"] = received * gates  # else they are kept for backward
        for name, size in sizes.items():
            needed[name] = max(needed[name], size)
    buffers.reserve(needed, device)


def _kind(kind: str, i: int) -> str:
    """What is counted: the rows under `kind`; what goes with them is their gate weights, or those's gradients."""
    return kind if i == 0 else "gate weights"


def _wait_all(exchanges: list[Exchange]) -> list[Tensor]:
    return [exchange.wait() for exchange in exchanges]


def _send_schedule(
    row_assignment_of: np.ndarray,
    counts: np.ndarray,
    token_of_row: np.ndarray,
    num_tokens: int,
    top_k: int,
    device: torch.device,
) -> Schedule:
    """Tokens sorted by destination: slots are ranks, rows what is sent."""
    row, choice = np.divmod(row_assignment_of, top_k)
    assignment_of = (token_of_row[row] * top_k + choice).astype(np.int32)
    position_of = np.full(num_tokens * top_k, -1, np.int32)
    position_of[assignment_of] = np.arange(len(assignment_of))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Schedule(
        slot_offsets=torch.from_numpy(offsets).to(device),
        assignment_of=torch.from_numpy(assignment_of).to(device),
        position_of=torch.from_numpy(position_of.reshape(-1, top_k)).to(device),
    )
