"""The tables of one batch on one rank: made once before the step, read by every layer of every micro-batch.

Making them costs one all-gather of row counts and one all-to-all of slot numbers a micro-batch; a layer then exchanges
nothing but rows, gate weights and replicas.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .. import ops
from ..planner import BatchPlan, RoutingTrace
from ..planner.errors import InputError, ShapeError
from ..schedule import Schedule
from .comm import Comm
from .layer import LayerSite
from .replicas import ReplicaRoute, replica_route
from .routes import SendRoute, send_routes


@dataclass(frozen=True)
class MicroBatchTables:
    """One micro-batch.

    `expert_ids` [n, L, K]: recorded routing of this rank's rows, -1 where unknown.
    `routes`: this rank's sends, a layer each.
    `receive_counts` int64 [L, R]: rows that come from each rank.
    `received_slots`: int16 [received, K] a layer, slots on this rank that each received row visits.
    `replicas`: this rank's transfers, a layer each; None where the layer has no replicas.
    """

    expert_ids: np.ndarray
    routes: list[SendRoute]
    receive_counts: np.ndarray
    received_slots: list[np.ndarray]
    replicas: list[ReplicaRoute | None]


def make_tables(
    comm: Comm,
    plan: BatchPlan,
    loads_LMRE: np.ndarray,
    trace: RoutingTrace,
    micro_batch_of_sequence: np.ndarray,
    device: torch.device,
) -> list[MicroBatchTables]:
    """The tables of every micro-batch. Collective."""
    layers, micro_batches = range(plan.num_layers), range(plan.num_micro_batches)
    expert_ids = [trace.select(np.flatnonzero(micro_batch_of_sequence == m)).expert_ids for m in micro_batches]
    by_layer = [send_routes(expert_ids, plan, loads_LMRE, layer, comm.rank) for layer in layers]
    routes = [[by_layer[layer][m] for layer in layers] for m in micro_batches]
    receive_counts_MLR = _exchange_counts(comm, routes, device)
    return [
        MicroBatchTables(
            expert_ids=expert_ids[m],
            routes=routes[m],
            receive_counts=receive_counts_MLR[m],
            received_slots=_exchange_slots(comm, routes[m], receive_counts_MLR[m], device, m),
            replicas=[replica_route(plan, layer, m, comm.rank) for layer in layers],
        )
        for m in micro_batches
    ]


def _exchange_counts(comm: Comm, routes: list[list[SendRoute]], device: torch.device) -> np.ndarray:
    """int64 [M, L, R]: rows that this rank gets from each rank in every layer and micro-batch."""
    counts_MLR = np.array([[route.counts for route in layers] for layers in routes])
    one_each = [1] * comm.size
    send = torch.from_numpy(np.ascontiguousarray(counts_MLR.transpose(2, 0, 1))).to(device)
    received = comm.exchange(send, one_each, one_each, "counts", "the exchange of row counts")
    return received.numpy(force=True).transpose(1, 2, 0)


def _exchange_slots(
    comm: Comm, routes: list[SendRoute], receive_counts_LR: np.ndarray, device: torch.device, micro_batch: int
) -> list[np.ndarray]:
    """Send the slots of every layer's rows at once; return what this rank receives, a layer each.

    They travel as bytes: neither gloo nor NCCL has a 16-bit integer.
    """
    sends = [np.split(route.slots, np.cumsum(route.counts)[:-1]) for route in routes]
    send = np.concatenate([layer[destination] for destination in range(comm.size) for layer in sends])
    received = comm.exchange(
        torch.from_numpy(send.view(np.uint8)).to(device),
        np.sum([route.counts for route in routes], 0).tolist(),
        receive_counts_LR.sum(0).tolist(),
        "slots",
        f"the exchange of slots, micro-batch {micro_batch}",
    )
    slots = received.numpy(force=True).view(np.int16)
    pieces = np.split(slots, np.cumsum(receive_counts_LR.T.reshape(-1))[:-1])  # source by source, its layers in order
    return [np.concatenate(pieces[layer :: len(routes)]) for layer in range(len(routes))]


class MicroBatch:
    """One micro-batch as the layers see it: the recorded indices, and a `LayerSite` a layer.

    Args:
        tables: from `make_tables`.
        rows: int [tokens of the model's input], which row of the micro-batch's trace each token is, -1 for padding;
            None: the model's input is the rows themselves, in trace order.

    Raises: InputError where `rows` leaves out a recorded row, or names one twice.
    """

    def __init__(
        self,
        comm: Comm,
        plan: BatchPlan,
        tables: MicroBatchTables,
        index: int,
        rows: np.ndarray | None,
        device: torch.device,
    ):
        self._comm, self._plan, self._tables, self._index, self._device = comm, plan, tables, index, device
        num_rows, _, self._top_k = tables.expert_ids.shape
        rows = np.arange(num_rows) if rows is None else np.asarray(rows)
        rows = rows if rows.size else rows.astype(np.int64)  # an empty list has no integers in it
        self.token_of_row = _token_of_row(rows, tables.expert_ids, index)
        self.num_tokens = len(rows)
        padding = np.full((1, *tables.expert_ids.shape[1:]), -1, tables.expert_ids.dtype)
        self.expert_ids = np.concatenate([tables.expert_ids, padding])[rows]  # row -1 is the last one
        self.sites = [self._make_site(layer) for layer in range(plan.num_layers)]

    def _make_site(self, layer: int) -> LayerSite:
        tables = self._tables
        route, replicas = tables.routes[layer], tables.replicas[layer]
        slots = self._plan.experts_per_rank + (self._plan.num_slots if replicas else 0)
        received_slots = tables.received_slots[layer]
        return LayerSite(
            comm=self._comm,
            send=self._send_schedule(route),
            send_counts=route.counts.tolist(),
            receive_counts=tables.receive_counts[layer].tolist(),
            local=ops.backend(self._device).build_schedule(
                torch.from_numpy(received_slots).to(self._device),
                slots,
                num_rows=int(np.count_nonzero(received_slots >= 0)),
            ),
            replicas=replicas,
            pushed_slots=torch.from_numpy(replicas.home_slots).to(self._device) if replicas else None,
            weight_of_slot=torch.from_numpy(replicas.weight_of_slot).to(self._device) if replicas else None,
            where=f"layer {layer}, micro-batch {self._index}",
        )

    def _send_schedule(self, route: SendRoute) -> Schedule:
        token, choice = np.divmod(route.assignment_of, self._top_k)
        assignment_of = (self.token_of_row[token] * self._top_k + choice).astype(np.int32)
        position_of = np.full(self.num_tokens * self._top_k, -1, np.int32)
        position_of[assignment_of] = np.arange(len(assignment_of))
        offsets = np.concatenate([[0], np.cumsum(route.counts)]).astype(np.int32)
        return Schedule(
            slot_offsets=torch.from_numpy(offsets).to(self._device),
            assignment_of=torch.from_numpy(assignment_of).to(self._device),
            position_of=torch.from_numpy(position_of.reshape(-1, self._top_k)).to(self._device),
        )


def _token_of_row(rows: np.ndarray, expert_ids: np.ndarray, micro_batch: int) -> np.ndarray:
    """Position in the model's input of every row of the trace, -1 where an unrecorded row is left out."""
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(
            f"rows is {rows.dtype} {rows.shape}; it must be a vector of integers, one for each input token"
        )
    if rows.size and not -1 <= rows.min() <= rows.max() < len(expert_ids):
        raise InputError(
            f"rows of micro-batch {micro_batch} span {rows.min()}..{rows.max()}; its trace has the rows "
            f"0..{len(expert_ids) - 1} (-1: padding)"
        )
    tokens = np.flatnonzero(rows >= 0)
    times = np.bincount(rows[tokens], minlength=len(expert_ids))
    recorded = expert_ids[:, 0, 0] >= 0
    wrong = np.flatnonzero((times > 1) | ((times == 0) & recorded))
    if len(wrong):
        raise InputError(
            f"rows of micro-batch {micro_batch} name row {wrong[0]} {times[wrong[0]]} times; no row may be named "
            "twice, and every recorded row must be in the model's input"
        )
    token_of_row = np.full(len(expert_ids), -1, np.int64)
    token_of_row[rows[tokens]] = tokens
    return token_of_row
