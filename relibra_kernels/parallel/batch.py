"""One open batch on one rank: its plan, its tables, its replicas; and what it reports when it is over."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ..alignment import Alignment
from ..nn import ReplicatedExperts
from ..planner import BatchPlan
from ..planner.errors import CommunicationError, InputError
from ..planner.loads import total_loads
from ..planner.plan import contiguous_home, rank_loads
from ..weights import ExpertWeights
from .ahead import BatchTables, Prepared
from .comm.devices import download_later
from .comm.groups import Groups
from .experts.accumulation import GradientSums
from .experts.adapters import LateGradients, adapted_weights
from .experts.kept import KeptReplicas, sources_of_fetched
from .experts.replicas import ReplicaPushes, ReplicaRoutes
from .microbatch import AnyMicroBatch, BatchParts, MicroBatch, Record, UnrecordedMicroBatch, check_input_rows
from .routed_batch import RoutedBatch
from .session import Session
from .stats import BatchStats, bytes_of_kinds
from .tokens.destinations import Placements
from .tokens.transport import Transport, reserve


@dataclass(frozen=True)
class ExpertStore:
    """Where a batch finds the experts of this rank.

    weights_of: of a layer, as they are now
    rows: (elements, dtype) of a token's row in every layer; None: weights are there only while their layer runs, so
        that no replica is kept or fetched ahead, and buffers grow when they are needed
    experts: of every layer, where they may have adapters; else empty
    """

    weights_of: Callable[[int], ExpertWeights]
    num_layers: int
    rows: Sequence[tuple[int, torch.dtype]] | None
    device: torch.device
    experts: Sequence[ReplicatedExperts] = ()

    def effective(self, layer: int) -> ExpertWeights:
        """The weights that replicas compute with: the layer's own, and what adapters add to them."""
        if not self.experts:
            return self.weights_of(layer)
        with torch.no_grad():
            return adapted_weights(self.experts[layer])


class OpenBatch:
    """Made once the experts are at their homes. Making it fetches the kept replicas: collective.

    Args:
        loads_LMRE, batch: None where no routing is recorded: every micro-batch is routed live.
    """

    def __init__(
        self,
        session: Session,
        groups: Groups,
        plan: BatchPlan,
        loads_LMRE: np.ndarray | None,
        batch: RoutedBatch | None,
        store: ExpertStore,
        transport: Transport,
    ):
        self.plan, self._groups, self._session, self._loads = plan, groups, session, loads_LMRE
        self._store, self.routed = store, batch
        device = self.device = store.device
        comm = self._comm = groups.experts
        self._sums = GradientSums(session.options.gradient_dtype is not None)
        kept = plan.kept & (plan.replicas[:, 0] >= 0) & (store.rows is not None)  # [L, R, S]
        with session.ledger.span("replica", device):
            self._kept = KeptReplicas(comm, plan, store.effective, kept, device)
        placements = Placements(plan, loads_LMRE, device)
        self._tables = None
        if batch is not None and loads_LMRE is not None:
            self._tables = BatchTables(transport, plan, loads_LMRE, batch, placements, device, session.options)
        self.alignment = Alignment(session.options.on_shift, download_later)
        self._parts = BatchParts(
            session=session,
            groups=groups,
            plan=plan,
            placements=placements,
            pushes=ReplicaPushes(groups.side, store.effective, self._kept.weights),
            kept=self._kept,
            routes=ReplicaRoutes(plan, comm.rank, sources_of_fetched(plan, kept), self._kept.slots, device),
            sums=self._sums,
            transport=transport,
            device=device,
            alignment=self.alignment,
            rows=store.rows,
        )
        self._records: dict[int, list[Record]] = {}

    def micro_batch(self, index: int, rows: np.ndarray | None) -> AnyMicroBatch:
        """Open a micro-batch: collective.

        Raises: InputError where the plan has none of this index, or `rows` do not fit, here or on another rank.
        """
        self.check_index(index)
        opened = self._open(int(index), rows)
        self._session.ledger.begin_pass(opened.timed)
        self._records.setdefault(int(index), []).append(opened.record)
        return opened

    def check_index(self, index: int) -> None:
        """Raises: InputError where the plan has no such micro-batch."""
        count = self.plan.num_micro_batches
        if not isinstance(index, int | np.integer) or not 0 <= index < count:
            raise InputError(f"index is {index!r}; the plan has micro-batches 0..{count - 1}")

    @property
    def serial(self) -> int:
        """Batches that open later have greater ones."""
        return self._session.serial

    def _open(self, index: int, rows: np.ndarray | None) -> AnyMicroBatch:
        batch, parts, store = self.routed, self._parts, self._store
        if batch is None or self._tables is None:
            return UnrecordedMicroBatch(parts, index)
        rows = batch.rows[index] if rows is None and batch.rows is not None else rows
        fed = None if rows is None else np.asarray(rows)
        if fed is not None and not fed.size:
            fed = fed.astype(np.int64)  # an empty list has no integers in it

        def check(prepared: Prepared) -> None:
            self.alignment.judge()  # after the first micro-batch
            if fed is not None:
                check_input_rows(fed, prepared.expert_ids.shape[1], batch.needed(index), index)

        with self._session.ledger.span("tables", self.device):
            tables = self._tables.get(index, check)
            parts.transport.buffers.forget_rows()
            if store.rows is not None:
                options = self._session.options
                reserve(parts.transport, tables.sizes, batch.trace.top_k, store.rows, options, self.device)
            return MicroBatch(parts, tables, index, fed)

    def finish(self) -> None:
        """Kept replicas' gradients go home; routing that left what was recorded is refused. Collective.

        Raises: InputError where more tokens chose other experts than `spare_rows` allows, or the record is shifted.
        """
        self._parts.pushes.finish()
        with self._session.ledger.span("replica", self.device):
            weights_of, experts, late = self._store.weights_of, self._store.experts, LateGradients()

            def gradients(layer: int) -> ExpertWeights:
                own = self._sums.gradients(layer, weights_of(layer))
                return late.buffers(experts[layer], own) if experts else own

            self._kept.give_back(gradients)
            self._sums.close(weights_of)
            late.finish()
        spare = self._session.options.spare_rows
        with self._groups.agreeing(self.device, "closing the batch"):
            self.alignment.judge()
            worst = max((int(record.differing.max()) for seen in self._records.values() for record in seen), default=0)
            if worst > spare:
                raise InputError(
                    f"{worst} tokens of one layer and micro-batch were routed to other experts than recorded; "
                    f"spare_rows is {spare}: replay the recorded routing, or raise spare_rows"
                )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the block, then finish the batch. An error within is told to the other ranks, which stop too."""
        try:
            yield
            self.finish()
        except BaseException as error:
            if self._comm.alarm is not None and not isinstance(error, CommunicationError):  # about another rank
                self._comm.alarm.sound(self._comm.rank, error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """End the batch: nothing of it can run any more."""
        self._session.is_open = False
        if self._tables is not None:
            self._tables.close()
        self._parts.pushes.close()
        self._kept.close()

    def stats(self) -> BatchStats:
        """What the batch did, over the group. Collective. Also after the batch is closed."""
        plan, ledger, device = self.plan, self._session.ledger, self.device
        shape = (plan.num_layers, plan.num_micro_batches)
        actual = np.full(shape, -1, np.int64)
        unknown = differing = 0
        for index, seen in self._records.items():
            actual[:, index] = np.maximum.reduce([record.loads for record in seen])
            unknown += seen[-1].num_live
            differing += int(torch.stack([record.differing for record in seen]).max(0).values.sum())
        seconds = ledger.seconds()
        nanoseconds = [round(1e9 * each) for each in (seconds["compute"], seconds["replica"] + seconds["migration"])]
        counts = [unknown, differing, self.alignment.same, self.alignment.known, *nanoseconds]
        loads = self._comm.gather_arrays(np.append(actual, counts), device, "gathering the statistics")
        actual_RLM = loads[:, : -len(counts)].reshape(-1, *shape)
        unknown, differing, same, known, compute, spent = loads[:, -len(counts) :].sum(0).tolist()
        ran = np.asarray((actual_RLM >= 0).all(0))
        sent = bytes_of_kinds(ledger.batch_bytes())
        actual_max_mean = planned = _max_mean(actual_RLM, ran)
        static = saved = None
        if self._loads is not None:
            planned = _max_mean(plan.rank_loads(self._loads).transpose(2, 0, 1), ran)
            static = _max_mean(_static_loads(plan, self._loads), ran)
            if ledger.layers_timed:
                saved = (compute * (static - actual_max_mean) - spent) / self._comm.size / 1e9
        return BatchStats(
            rank=self._comm.rank,
            static_max_mean=static,
            planned_max_mean=planned,
            actual_max_mean=actual_max_mean,
            saved_seconds=saved,
            layers_run=int(ran.sum()),
            unknown_tokens=unknown,
            differing_tokens=differing,
            agreeing_share=same / known if known else None,
            replicas=int((plan.replicas >= 0).sum()),
            replicas_kept=int(self._kept.kept_LRS.sum()),
            dispatch_seconds=seconds["dispatch"],
            compute_seconds=seconds["compute"],
            combine_seconds=seconds["combine"],
            replica_seconds=seconds["replica"],
            live_seconds=seconds["live"],
            migration_seconds=seconds["migration"],
            tables_seconds=seconds["tables"],
            token_fast_bytes=sent["token", "fast"],
            token_slow_bytes=sent["token", "slow"],
            fetched_fast_bytes=sent["fetched", "fast"],
            fetched_slow_bytes=sent["fetched", "slow"],
            kept_fast_bytes=sent["kept", "fast"],
            kept_slow_bytes=sent["kept", "slow"],
            migration_fast_bytes=sent["migration", "fast"],
            migration_slow_bytes=sent["migration", "slow"],
        )


def _static_loads(plan: BatchPlan, loads_LMRE: np.ndarray) -> np.ndarray:
    """int64 [R, L, M]: assignments of each rank with contiguous homes and no replicas."""
    home_LE = contiguous_home(plan.num_layers, plan.num_experts, plan.num_ranks)
    per_rank = rank_loads(total_loads(loads_LMRE), home_LE, np.full_like(plan.replicas, -1), np.zeros_like(plan.quota))
    return per_rank.transpose(2, 0, 1)


def _max_mean(loads_RLM: np.ndarray, ran_LM: np.ndarray) -> float:
    """Mean over the (layer, micro-batch) pairs that ran and have load; 1 where there is none."""
    mean = loads_RLM.mean(0)
    used = ran_LM & (mean > 0)
    return float((loads_RLM.max(0)[used] / mean[used]).mean()) if used.any() else 1.0
