"""The tables of a batch on one rank: made a micro-batch ahead of the step, read by every layer.

What a rank sends follows from its own trace and is worked out in the background while the micro-batch before runs.
What it receives needs one exchange of row counts and one of slot numbers when the micro-batch opens; a layer then
exchanges nothing but rows, gate weights and replicas.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ...planner import BatchPlan, RoutingTrace
from ...planner.errors import InputError
from ..comm.collectives import Comm
from .routes import SendRoute, send_routes

KEPT = 2  # micro-batches whose tables stay, so that a second pass over the last one makes none


@dataclass(frozen=True)
class MicroBatchTables:
    """One micro-batch.

    `expert_ids` [n, L, K]: recorded routing of this rank's rows, -1 where unknown.
    `live` bool [n]: rows that are routed live: unknown, and not the last of their sequence.
    `live_counts` int64 [R]: how many of them every rank has.
    `routes`: this rank's sends, a layer each.
    `receive_counts` int64 [L, R]: rows that come from each rank.
    `received_slots`: int16 [received, K] a layer, slots on this rank that each received row visits.
    """

    expert_ids: np.ndarray
    live: np.ndarray
    live_counts: np.ndarray
    routes: list[SendRoute]
    receive_counts: np.ndarray
    received_slots: list[np.ndarray]


class Tables:
    """The tables of the micro-batches of one batch, each made when it is needed, on all ranks in the same order.

    Args:
        loads_LMRE: of the whole group. trace, micro_batch_of_sequence: of this rank.
    """

    def __init__(
        self,
        comm: Comm,
        plan: BatchPlan,
        loads_LMRE: np.ndarray,
        trace: RoutingTrace,
        micro_batch_of_sequence: np.ndarray,
        device: torch.device,
    ):
        self._comm, self._plan, self._loads, self._device = comm, plan, loads_LMRE, device
        self._trace, self._groups = trace, micro_batch_of_sequence
        self._live = trace.unknown
        self._live[trace.offsets[1:][np.diff(trace.offsets) > 0] - 1] = False  # last tokens need no route
        self._kept: OrderedDict[int, MicroBatchTables] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "relibra-tables")
        self._ahead: tuple[int, Future[list[SendRoute]]] | None = None
        self._look_ahead(0)

    def get(self, micro_batch: int) -> MicroBatchTables:
        """Collective. Raises: InputError where another rank opens another micro-batch."""
        known = self._kept.get(micro_batch)
        if known is None:
            known = self._make(micro_batch)
        else:
            self._exchange_counts(micro_batch, known.expert_ids[:0], known.routes)
        self._kept[micro_batch] = known
        self._kept.move_to_end(micro_batch)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        self._look_ahead(micro_batch + 1)
        return known

    def close(self) -> None:
        """Stop working ahead."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _make(self, micro_batch: int) -> MicroBatchTables:
        expert_ids, live = self._rows(micro_batch)
        if self._ahead is not None and self._ahead[0] == micro_batch:
            routes = self._ahead[1].result()
        else:
            routes = self._routes(micro_batch)
        live_counts, receive_counts_LR = self._exchange_counts(micro_batch, live, routes)
        return MicroBatchTables(
            expert_ids=expert_ids,
            live=live,
            live_counts=live_counts,
            routes=routes,
            receive_counts=receive_counts_LR,
            received_slots=self._exchange_slots(routes, receive_counts_LR, micro_batch),
        )

    def _look_ahead(self, micro_batch: int) -> None:
        known = micro_batch >= self._plan.num_micro_batches or micro_batch in self._kept
        if not known and (self._ahead is None or self._ahead[0] != micro_batch):
            self._ahead = micro_batch, self._worker.submit(self._routes, micro_batch)

    def _sequences(self, micro_batch: int) -> np.ndarray:
        return np.flatnonzero(self._groups == micro_batch)

    def _rows(self, micro_batch: int) -> tuple[np.ndarray, np.ndarray]:
        sequences = self._sequences(micro_batch)
        starts, ends = self._trace.offsets[:-1][sequences], self._trace.offsets[1:][sequences]
        live = [self._live[start:end] for start, end in zip(starts, ends, strict=True)]
        return self._trace.select(sequences).expert_ids, np.concatenate([np.zeros(0, bool), *live])

    def _routes(self, micro_batch: int) -> list[SendRoute]:
        expert_ids = self._trace.select(self._sequences(micro_batch)).expert_ids
        return send_routes(expert_ids, self._plan, self._loads, micro_batch, self._comm.rank)

    def _exchange_counts(
        self, micro_batch: int, live: np.ndarray, routes: list[SendRoute]
    ) -> tuple[np.ndarray, np.ndarray]:
        """int64 [R] live rows of every rank, and [L, R] rows that this rank gets from each in every layer."""
        comm = self._comm
        counts_RL = np.array([route.counts for route in routes]).T
        header = np.broadcast_to([micro_batch, np.count_nonzero(live)], (comm.size, 2))
        send = torch.from_numpy(np.ascontiguousarray(np.concatenate([header, counts_RL], 1))).to(self._device)
        one_each = [1] * comm.size
        received = comm.exchange(send, one_each, one_each, "counts", f"the exchange of row counts of {micro_batch}")
        table = received.numpy(force=True)
        other = np.flatnonzero(table[:, 0] != micro_batch)
        if len(other):
            raise InputError(
                f"rank {comm.rank} opened micro-batch {micro_batch} and rank {other[0]} micro-batch "
                f"{table[other[0], 0]}; all ranks must open the same ones in the same order"
            )
        return table[:, 1].copy(), np.ascontiguousarray(table[:, 2:].T)

    def _exchange_slots(
        self, routes: list[SendRoute], receive_counts_LR: np.ndarray, micro_batch: int
    ) -> list[np.ndarray]:
        """Send the slots of every layer's rows at once; return what this rank receives, a layer each.

        They travel as bytes: neither gloo nor NCCL has a 16-bit integer.
        """
        sends = [np.split(route.slots, np.cumsum(route.counts)[:-1]) for route in routes]
        send = np.concatenate([layer[destination] for destination in range(self._comm.size) for layer in sends])
        received = self._comm.exchange(
            torch.from_numpy(send.view(np.uint8)).to(self._device),
            np.sum([route.counts for route in routes], 0).tolist(),
            receive_counts_LR.sum(0).tolist(),
            "slots",
            f"the exchange of slots, micro-batch {micro_batch}",
        )
        slots = received.numpy(force=True).view(np.int16)
        # source by source, its layers in order
        pieces = np.split(slots, np.cumsum(receive_counts_LR.T.reshape(-1))[:-1])
        return [np.concatenate(pieces[layer :: len(routes)]) for layer in range(len(routes))]
