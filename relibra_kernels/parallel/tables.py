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
from .routes import SendRoute, send_route


@dataclass(frozen=True)
class MicroBatchTables:
    """One micro-batch.

    `expert_ids` [n, L, K]: recorded routing of this rank's rows, -1 where unknown.
    `routes`: this rank's sends, a layer each.
    `received_slots`: int16 [received, K] a layer, slots on this rank that each received row visits.
    `rows` int64 [L, R, R]: rows that each source (axis 1) sends to each destination (axis 2).
    """

    expert_ids: np.ndarray
    routes: list[SendRoute]
    received_slots: list[np.ndarray]
    replicas: list[ReplicaRoute | None]
    rows: np.ndarray


def make_tables(
    comm: Comm,
    plan: BatchPlan,
    loads_LMRE: np.ndarray,
    trace: RoutingTrace,
    micro_batch_of_sequence: np.ndarray,
    device: torch.device,
) -> list[MicroBatchTables]:
    """The tables of every micro-batch. Collective."""
    expert_ids = [
        trace.select(np.flatnonzero(micro_batch_of_sequence == m)).expert_ids for m in range(plan.num_micro_batches)
    ]
    routes = [
        [send_route(ids[:, layer], plan, loads_LMRE, layer, micro_batch, comm.rank) for layer in range(plan.num_layers)]
        for micro_batch, ids in enumerate(expert_ids)
    ]
    counts = np.array([[route.counts for route in layers] for layers in routes])  # [M, L, R]
    rows = comm.gather_arrays(counts, device, "the exchange of row counts").transpose(
        1, 2, 0, 3
    )  # [M, L, R_src, R_dst]
    return [
        MicroBatchTables(
            expert_ids=expert_ids[m],
            routes=routes[m],
            received_slots=_exchange_slots(comm, routes[m], rows[m], device, f"the exchange of slots, micro-batch {m}"),
            replicas=[replica_route(plan, layer, m, comm.rank) for layer in range(plan.num_layers)],
            rows=rows[m],
        )
        for m in range(plan.num_micro_batches)
    ]


def _exchange_slots(
    comm: Comm, routes: list[SendRoute], rows_LSD: np.ndarray, device: torch.device, phase: str
) -> list[np.ndarray]:
    """Send the slots of every layer's rows at once; return what this rank receives, a layer each.

    They travel as int32: neither gloo nor NCCL has a 16-bit integer.
    """
    sends = [np.split(route.slots, np.cumsum(route.counts)[:-1]) for route in routes]
    send = np.concatenate([layer[destination] for destination in range(comm.size) for layer in sends])
    received = (
        comm.exchange(
            torch.from_numpy(send.astype(np.int32)).to(device),
            rows_LSD[:, comm.rank].sum(0).tolist(),
            rows_LSD[:, :, comm.rank].sum(0).tolist(),
            "slots",
            phase,
        )
        .numpy(force=True)
        .astype(np.int16)
    )
    counts_SL = rows_LSD[:, :, comm.rank].T
    pieces = np.split(received, np.cumsum(counts_SL.reshape(-1))[:-1])  # source by source, its layers in order
    layers = len(routes)
    return [np.concatenate(pieces[layer::layers]) for layer in range(layers)]


class MicroBatch:
    """One micro-batch as the layers see it: the recorded indices, and a `LayerSite` a layer, made when first needed.

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
        if rows is None:
            rows = np.arange(num_rows)
        self.token_of_row = _token_of_row(np.asarray(rows), tables.expert_ids, index)
        self.num_tokens = len(rows)
        padding = np.full((1, *tables.expert_ids.shape[1:]), -1, tables.expert_ids.dtype)
        self.expert_ids = np.concatenate([tables.expert_ids, padding])[rows]  # row -1 is the last one
        self._sites: dict[int, LayerSite] = {}

    def site(self, layer: int) -> LayerSite:
        """What `layer` needs to run; the same object in forward and in a recomputation."""
        if layer not in self._sites:
            self._sites[layer] = self._make_site(layer)
        return self._sites[layer]

    def _make_site(self, layer: int) -> LayerSite:
        tables, me = self._tables, self._comm.rank
        route, replicas, rows = tables.routes[layer], tables.replicas[layer], tables.rows[layer]
        slots = self._plan.experts_per_rank + (self._plan.num_slots if replicas else 0)
        received_slots = tables.received_slots[layer]
        return LayerSite(
            comm=self._comm,
            send=self._send_schedule(route),
            send_counts=rows[me].tolist(),
            receive_counts=rows[:, me].tolist(),
            local=ops.backend(self._device).build_schedule(
                torch.from_numpy(received_slots).to(self._device),
                slots,
                num_rows=int(np.count_nonzero(received_slots >= 0)),
            ),
            replicas=replicas,
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
            f"rows of micro-batch {micro_batch} name recorded row {wrong[0]} {times[wrong[0]]} times; every "
            "recorded row must be in the model's input exactly once"
        )
    token_of_row = np.full(len(expert_ids), -1, np.int64)
    token_of_row[rows[tokens]] = tokens
    return token_of_row
