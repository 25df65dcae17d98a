"""ExpertParallel: train a model whose MoE layers live on many ranks, under a plan."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..planner import BatchPlan, ClusterSpec, Estimate, PlanOptions, RoutingTrace
from ..planner.errors import InputError, ReLibraError
from .agreement import Opening
from .batch import ExpertStore, OpenBatch
from .checks import check_trace
from .comm.alarm import Alarm
from .comm.watchdog import start_watchdog
from .experts.adapters import find_adapters
from .planning import Planning
from .routed_batch import RoutedBatch, routed_batch
from .running import RecordedForwards
from .session import RuntimeOptions, Session
from .spread_model import SpreadModel
from .stats import BatchStats


class ExpertParallel(SpreadModel):
    """Shards the experts of every `ReplicatedMoE` of a model over a process group and runs them under a plan.

    Construct it on every rank, with the whole model, before the optimizer: each rank keeps its E/R experts of every
    layer (contiguous at first) as parameters, in place of all of them. Then, for every batch::

        plan = ep.plan(batch)
        with ep.batch(plan, batch, optimizer):
            for m in range(batch.num_micro_batches):
                with ep.micro_batch(m):
                    loss(model(inputs[m])).backward()
        ep.reduce_gradients()
        ep.clip_grad_norm_(1.0)
        optimizer.step()

    where `batch` is a `RoutedBatch`. Losses must be normalised over all ranks: gradients are summed, unless
    `reduction` is "mean".

    Args:
        model: holds one or more `ReplicatedMoE`, in layer order; one such layer is a model as well.
        cluster: `num_nodes * gpus_per_node` must be the size of the expert-parallel group.
        mesh: which ranks train together: one dimension is the expert-parallel group; of two, the one named "ep" is,
            and the other holds copies of the experts (several expert-parallel groups, with one `home` for all). None:
            the default process group.
        model_name: written into plans; a plan for another model is refused.
        reduction: "sum" over all ranks, or "mean", as DDP and FSDP2 do with what they reduce.
        options: how memory, exactness and time are traded; the same on every rank.

    Raises: InputError where the model has no such layer, experts that are DTensors already, or fewer experts than there
        are ranks; for a mesh of more than two dimensions, or with "pp", "tp", "cp" or "sp" beside "ep".
    """

    def __init__(
        self,
        model: nn.Module,
        cluster: ClusterSpec,
        mesh: DeviceMesh | None = None,
        *,
        model_name: str = "",
        reduction: Literal["sum", "mean"] = "sum",
        options: RuntimeOptions | None = None,
    ):
        super().__init__(model, cluster, mesh, reduction, options)
        self.model_name = model_name
        layers, top_k = len(self.layers), self.layers[0].router.top_k
        self._alarm = Alarm(self.comm.ranks)
        for comm in self.groups.every:
            comm.alarm = self._alarm
        self._stop_watchdog = start_watchdog(self.comm, self.options.watchdog_seconds)
        self._opening = Opening(model, self.layers, self.groups, cluster, model_name, self.options.compare_dense)
        self._planning = Planning(
            lambda trace: check_trace(trace, layers, top_k, self.num_experts),
            self.groups,
            cluster,
            model_name,
            lambda: self.device,
            self._shape,
            self._transport.name,
        )
        self._last: OpenBatch | None = None

    def close(self) -> None:
        """Stop the watchdog, and free process groups that no other `ExpertParallel` uses. The model runs no more."""
        self._runner.closed = True
        self.groups.close()
        self._stop_watchdog()

    def gather_loads(
        self,
        batch: RoutedBatch | RoutingTrace,
        micro_batch_of_sequence: np.ndarray | None = None,
        num_micro_batches: int | None = None,
    ) -> np.ndarray:
        """The load table of the expert-parallel group, int32 [L, M, R, E], from its ranks' sequences. Collective.

        Args: as for `plan`.
        """
        return self._planning.gather_loads(*self._routed(batch, micro_batch_of_sequence, num_micro_batches))

    def plan(
        self,
        batch: RoutedBatch | RoutingTrace,
        micro_batch_of_sequence: np.ndarray | None = None,
        num_micro_batches: int | None = None,
        *,
        options: PlanOptions | None = None,
    ) -> BatchPlan:
        """Plan a batch, starting from where the experts are now. Collective; the same plan on every rank.

        With several expert-parallel groups, `home` is that of all groups' loads and replicas are this group's.

        Args:
            batch: the routed batch, of the group or of this rank. In its place, for whole sequences of this rank:
                their trace, int [sequences] `micro_batch_of_sequence`, and `num_micro_batches`.
            options: what the plan is to achieve, under which caps; the same on every rank. It is priced for this model,
                machine and transport, whatever `shape`, `device` and `transport` say; for `device` where the GPU is not
                a listed one.
        """
        routed = self._routed(batch, micro_batch_of_sequence, num_micro_batches)
        return self._planning.plan(*routed, self.home, options)

    def plan_later(
        self,
        batch: RoutedBatch | RoutingTrace,
        *rest: Any,
        options: PlanOptions | None = None,
    ) -> "Future[BatchPlan]":
        """`plan` in a thread or process of an executor, while the last rollouts finish. Collective until it returns.

        `plan_later(batch, executor)`, or `plan_later(trace, micro_batch_of_sequence, num_micro_batches, executor)`.

        Every rank plans from the same loads and the placement of now, so it must run before the next batch opens.
        Processes must be spawned (`mp_context=multiprocessing.get_context("spawn")`): a fork of a rank inherits the
        locks of its threads. They need neither a process group nor a GPU.
        """
        *short, executor = rest
        routed = self._routed(batch, *(short or (None, None)))
        return self._planning.plan_later(*routed, self.home, options, executor)

    def estimate(
        self, batch: RoutedBatch, plan: BatchPlan | None = None, *, options: PlanOptions | None = None
    ) -> Estimate:
        """What a batch would take: bytes, memory by kind, modelled time, and whether planning it pays. Collective.

        Nothing moves.

        Args:
            batch: the routed batch, of the group or of this rank.
            plan: what `plan` made of it; None: one is made here. Given on every rank or on none.
            options: as for `plan`.
        Raises: PlanError where the plan was made for other loads.
        """
        routed = self._routed(batch, None, None)
        return self._planning.estimate(*routed, self.home, plan, options, self.options.keep_replicas)

    def _routed(
        self, batch: Any, micro_batch_of_sequence: Any, num_micro_batches: int | None
    ) -> tuple[RoutedBatch | None, ReLibraError | None]:
        """What this rank has of a batch, or what is wrong with it: the others must hear of that."""
        try:
            here = self.comm.rank, self.comm.size
            return routed_batch(batch, micro_batch_of_sequence, num_micro_batches, *here), None
        except ReLibraError as error:
            return None, error

    @overload
    def batch(
        self, plan: BatchPlan, batch: RoutedBatch, optimizer: torch.optim.Optimizer | None, /
    ) -> AbstractContextManager[None]: ...

    @overload
    def batch(
        self,
        plan: BatchPlan,
        trace: RoutingTrace,
        micro_batch_of_sequence: np.ndarray,
        optimizer: torch.optim.Optimizer | None,
        /,
    ) -> AbstractContextManager[None]: ...

    def batch(self, plan: BatchPlan, batch: Any, *rest: Any) -> AbstractContextManager[None]:
        """Run a batch under `plan`: check it, move the experts to their homes, fetch the kept replicas. Collective.

        Leaving it returns the gradients of those replicas, so `reduce_gradients` and `optimizer.step()` come after it.

        Args:
            batch: the routed batch, as given to `plan`; or the trace of this rank's sequences and int [sequences]
                `micro_batch_of_sequence`. A row of -1 at the end of its sequence visits no expert; others are routed
                live.
            optimizer: last; whose state moves with the experts. None where the experts are not trained.

        Raises: PlanError for a plan made for another model, cluster, or routing; InputError for a trace or optimizer
            that does not fit, on this rank or another, and, when the first batch opens, for weights that differ between
            ranks. Nothing has moved then. On leaving, InputError where tokens chose other experts than recorded and
            there was no room for them.
        """
        *short, optimizer = rest
        groups = short[0] if short else None
        return self._batch_context(plan, *self._routed(batch, groups, plan.num_micro_batches), optimizer)

    @contextmanager
    def _batch_context(
        self,
        plan: BatchPlan,
        batch: RoutedBatch | None,
        problem: ReLibraError | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> Iterator[None]:
        find_adapters(self.model, self.layers)  # PEFT may have wrapped the experts since
        loads, local = None, np.zeros(0, np.int32)  # of the group, and of this rank
        try:
            if batch is not None:
                loads = self._planning.take_counted(batch)
                local = self._planning.count(batch) if loads is None else local
        except ReLibraError as error:
            problem = error
        tensors, everywhere = self._opening.agree(
            plan,
            optimizer,
            self.home,
            (self.options, self.reduction),
            is_open=self._runner.batch is not None,
            micro_batches=0 if batch is None else batch.num_micro_batches,
            counted=loads is not None,
            problem=problem,
        )
        assert batch is not None  # else a problem was raised
        self._alarm.begin()
        if loads is None or not everywhere:
            loads = self._planning.gather(local if loads is None else self._planning.count(batch))
        self._planning.check_made_for(plan, loads)
        session = Session(self.options, self.comm.ledger)
        self.comm.ledger.begin_batch()
        self._move(tensors, plan.home, optimizer)
        del tensors
        self._last = OpenBatch(session, self.groups, plan, loads, batch, self._store(), self._transport)
        with self._runner.running(self._last):
            yield

    @contextmanager
    def micro_batch(self, index: int, rows: np.ndarray | None = None) -> Iterator[None]:
        """Forwards within belong to this micro-batch: routers replay, experts are reached where the plan has them.

        Every rank must open every micro-batch, also one in which it has no tokens, in the same order. Backward may run
        within or later, before the batch is closed, in any order that all ranks share and in any thread; blocks may be
        checkpointed. A micro-batch may be opened again, for passes without gradients too.

        Args:
            rows: int [tokens of the model's input], which of the micro-batch's trace rows (its sequences in trace
                order) each token is; -1 for padding, which visits no expert. None: what the routed batch says, or else
                the input is exactly those rows.
        """
        with self._runner.forwards.entered(self._runner.open_batch().micro_batch(index, rows)):
            yield

    def _store(self) -> ExpertStore:
        experts = [moe.experts for moe in self.layers]
        rows = [(of_layer.hidden_size, of_layer.down_proj.dtype) for of_layer in experts]
        return ExpertStore(lambda layer: experts[layer].weights, len(experts), rows, self.device, experts)

    def stats(self) -> BatchStats:
        """What the last batch did: max/mean, seconds by part, bytes by kind and network. Collective.

        Raises: InputError before the first batch.
        """
        if self._last is None:
            raise InputError("stats needs a batch: there was none yet")
        return self._last.stats()

    def stats_line(self) -> str:
        """`stats` as one line of JSON, for a log with a line for each batch. Collective."""
        return self.stats().json_line()

    @contextmanager
    def record(self) -> Iterator[RecordedForwards]:
        """Record what the routers choose in the forwards within: the pass that computes old log-probabilities.

            with ep.record() as record, torch.no_grad():
                for inputs in micro_batches:
                    old = log_probabilities(model(inputs))
            batch = record.routed_batch()
            with ep.batch(ep.plan(batch), batch, optimizer): ...

        Every forward is a micro-batch. All ranks must run equally many. No batch may be open.
        """
        self._check_between_batches("record")
        record = RecordedForwards(len(self.layers), self.num_experts)
        with self._runner.recording(record):
            yield record
