"""The tables of a batch on one rank, made a micro-batch ahead of the step.

What a rank sends follows from its own recorded ids, which are uploaded once, and is worked out on the device while the
micro-batch before runs. What it receives needs one exchange of counts between the hosts when the micro-batch opens; it
also says whether every rank opens the same one. A layer then exchanges nothing but rows and replicas.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..planner import BatchPlan
from ..planner.errors import InputError, ReLibraError
from .comm.devices import download_later, upload
from .routed_batch import RoutedBatch
from .session import RuntimeOptions
from .tokens.arrivals import Arrivals
from .tokens.destinations import Destinations, Placements, planned_destinations, splits_of_source
from .tokens.tables import SendTables, Sizes
from .tokens.transport import Transport, exchange_messages

KEPT = 2  # micro-batches whose tables stay, so that a second pass over the last ones makes none
HEADER = 3  # numbers before the counts in what ranks tell each other


@dataclass(frozen=True)
class Prepared:
    """What one rank knows of a micro-batch by itself.

    `expert_ids` int64 [L, n, K], on the device: recorded routing of this rank's rows, -1 where unknown.
    `live` bool [n], on the device: rows that are routed live: unknown, and not the last of their sequence.
    `num_live`, `num_unknown`: how many rows are live, and how many are unknown, on this rank.
    `destinations`: of the recorded assignments.
    `counts`: gives those of `send`, on the host.
    `ready`: on CUDA, when the device has all that.
    """

    expert_ids: Tensor
    live: Tensor
    num_live: int
    num_unknown: int
    destinations: Destinations
    send: SendTables
    counts: Callable[[], np.ndarray]
    ready: "torch.cuda.Event | None"


@dataclass(frozen=True)
class MicroBatchTables:
    """One micro-batch: what this rank prepared, and what the others told it.

    `takes_live`: whether layers are routed live, since any rank has rows that are. `sizes`: of each layer. `arrivals`:
    of each layer, where none is routed live.
    """

    prepared: Prepared
    takes_live: bool
    sizes: list[Sizes]
    arrivals: list[Arrivals]


class BatchTables:
    """The tables of the micro-batches of one batch, each made when it is needed, on all ranks in the same order.

    Args:
        transport: of the group.
        loads_LMRE: of the whole group. batch: of this rank.
    """

    def __init__(
        self,
        transport: Transport,
        plan: BatchPlan,
        loads_LMRE: np.ndarray,
        batch: RoutedBatch,
        placements: Placements,
        device: torch.device,
        options: RuntimeOptions,
    ):
        self._options = options
        self._transport, self._plan, self._loads, self._batch, self._device = transport, plan, loads_LMRE, batch, device
        self._ids, self._live = torch.from_numpy(batch.trace.expert_ids), torch.from_numpy(batch.live)
        self._placements = placements
        self._kept: OrderedDict[int, MicroBatchTables] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "relibra-tables")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, Future[Prepared]] | None = None
        self._look_ahead(0)

    def get(self, micro_batch: int, check: Callable[[Prepared], None]) -> MicroBatchTables:
        """Open a micro-batch: collective.

        Args:
            check: raises where this rank was given what does not fit; the others hear of it.
        Raises: that, or InputError where another rank refuses, or opens another micro-batch.
        """
        known = self._kept.get(micro_batch)
        prepared = known.prepared if known is not None else self._prepared(micro_batch)
        problem: ReLibraError | None = None
        try:
            check(prepared)
        except ReLibraError as error:
            problem = error
        counts = prepared.counts()
        header, received = self._exchange(micro_batch, prepared.num_live, counts, problem)
        if prepared.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(prepared.ready)
        if known is None:
            takes_live = bool(header[:, 2].any()) or self._options.spare_rows > 0
            known = self._received(prepared, takes_live, self._transport.sizes(counts, received), micro_batch)
        self._kept[micro_batch] = known
        self._kept.move_to_end(micro_batch)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        self._look_ahead(micro_batch + 1)
        return known

    def _received(self, prepared: Prepared, takes_live: bool, sizes: list[Sizes], micro_batch: int) -> MicroBatchTables:
        if takes_live:
            return MicroBatchTables(prepared, True, sizes, [])
        slots = self._plan.home_slots + self._plan.num_slots
        what = f"micro-batch {micro_batch}"
        arrivals = self._transport.arrivals(prepared.send, sizes, slots, self._options.overlap, what)
        return MicroBatchTables(prepared, False, sizes, arrivals)

    def close(self) -> None:
        """Stop working ahead."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _prepared(self, micro_batch: int) -> Prepared:
        if self._ahead is not None and self._ahead[0] == micro_batch:
            return self._ahead[1].result()
        return self._prepare(micro_batch)

    def _look_ahead(self, micro_batch: int) -> None:
        known = micro_batch >= self._plan.num_micro_batches or micro_batch in self._kept
        if not known and (self._ahead is None or self._ahead[0] != micro_batch):
            self._ahead = micro_batch, self._worker.submit(self._prepare, micro_batch)

    def _prepare(self, micro_batch: int) -> Prepared:
        if self._stream is None:
            return self._make(micro_batch)
        with torch.cuda.stream(self._stream):
            return self._make(micro_batch)

    def _make(self, micro_batch: int) -> Prepared:
        plan, rank, device = self._plan, self._transport.host.rank, self._device
        batch, sequences = self._batch, self._batch.sequences(micro_batch)
        starts, lengths = batch.trace.offsets[sequences].tolist(), batch.lengths[sequences].tolist()
        ids_NLK = self._gather(self._ids, starts, lengths)
        live = self._gather(self._live, starts, lengths)
        num_known = int(self._loads[0, micro_batch, rank].sum())
        ids_LNK = ids_NLK.to(torch.int64).transpose(0, 1).contiguous()
        split = upload(splits_of_source(plan, self._loads, micro_batch, rank), device)
        slots = upload(self._placements.slots(micro_batch), device)
        destinations = planned_destinations(ids_LNK, split, slots, num_known)
        send = self._transport.tables(destinations)
        counts = download_later(send.counts)
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return Prepared(
            expert_ids=ids_LNK,
            live=live,
            num_live=int(batch.live_of_sequence[sequences].sum()),
            num_unknown=sum(lengths) - num_known // batch.trace.top_k,
            destinations=destinations,
            send=send,
            counts=counts,
            ready=ready,
        )

    def _gather(self, rows: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
        """The rows of some sequences on the device, uploaded once."""
        parts = [rows[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        size = (sum(lengths), *rows.shape[1:])
        if self._device.type != "cuda":
            return (torch.cat(parts) if parts else rows.new_empty(size)).to(self._device)
        pinned = torch.empty(size, dtype=rows.dtype, pin_memory=True)
        if parts:
            torch.cat(parts, out=pinned)
        return pinned.to(self._device, non_blocking=True)

    def _exchange(
        self, micro_batch: int, num_live: int, counts_LC: np.ndarray, problem: ReLibraError | None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """int64 [R, 3]: (whether a rank refuses, its micro-batch, its live rows); and what the transport was told."""
        host = self._transport.host
        header = np.array([problem is not None, micro_batch, num_live], np.int64)
        messages = [np.concatenate([header, message]) for message in self._transport.messages(counts_LC)]
        received = exchange_messages(host, messages, f"the exchange of row counts of {micro_batch}")
        table = np.stack([message[:HEADER] for message in received])
        if problem is not None:
            raise problem
        refused = np.flatnonzero(table[:, 0])
        if len(refused):
            raise InputError(
                f"rank {host.ranks[refused[0]]} stopped opening micro-batch {micro_batch}; its own error says why"
            )
        other = np.flatnonzero(table[:, 1] != micro_batch)
        if len(other):
            raise InputError(
                f"rank {host.rank} opened micro-batch {micro_batch} and rank {other[0]} micro-batch "
                f"{table[other[0], 1]}; all ranks must open the same ones in the same order"
            )
        return table, [message[HEADER:] for message in received]
