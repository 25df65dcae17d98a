"""ExpertParallel: train a model whose MoE layers live on many ranks, under a plan."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..nn import ReplicatedExperts, ReplicatedMoE
from ..planner import BatchPlan, ClusterSpec, RoutingTrace, count_loads
from ..planner.errors import InputError, ReLibraError
from . import checkpoint, gradients
from .batch import OpenBatch
from .buffers import Buffers
from .checks import check_optimizer, check_plan, check_trace, checksum, model_digest
from .digests import check_same_weights
from .experts import expert_parameters, keep_experts, tensors_to_move
from .groups import Groups
from .logical import logical_tensors
from .microbatch import MicroBatch
from .migration import move_experts
from .plans import CountedLoads, plan_group
from .session import ForwardContext, RuntimeOptions, Session
from .stats import json_line
from .watchdog import start_watchdog


class ExpertParallel:
    """Shards the experts of every `ReplicatedMoE` of a model over a process group and runs them under a plan.

    Construct it on every rank, with the whole model, before the optimizer: each rank keeps its E/R experts of every
    layer (contiguous at first) as parameters, in place of all of them. Then, for every batch::

        plan = ep.plan(trace, micro_batch_of_sequence, num_micro_batches)
        with ep.batch(plan, trace, micro_batch_of_sequence, optimizer):
            for m in range(num_micro_batches):
                with ep.micro_batch(m):
                    loss(model(inputs[m])).backward()
        ep.reduce_gradients()
        ep.clip_grad_norm_(1.0)
        optimizer.step()

    where `trace` holds this rank's sequences. Losses must be normalised over all ranks: gradients are summed, unless
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

    Raises: InputError where the model has no such layer, or its experts do not divide over the ranks.
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
        self.model, self.cluster, self.model_name = model, cluster, model_name
        if reduction not in ("sum", "mean"):
            raise InputError(f"reduction is {reduction!r}; it must be 'sum' or 'mean'")
        self.reduction, self.options = reduction, options or RuntimeOptions()
        self.groups = Groups(mesh, cluster)
        self.comm = self.groups.experts
        self.layers = [module for module in model.modules() if isinstance(module, ReplicatedMoE)]
        if not self.layers:
            raise InputError(f"model {type(model).__name__} has no ReplicatedMoE: replace its MoE blocks first")
        counts = {moe.experts.num_experts for moe in self.layers}
        if len(counts) > 1 or any(moe.experts.dispatcher is not None for moe in self.layers):
            raise InputError(f"every MoE layer must have all of its experts, equally many; they have {sorted(counts)}")
        self.num_experts = counts.pop()
        per_rank = cluster.experts_per_rank(self.num_experts)
        contiguous = np.arange(self.num_experts, dtype=np.int32) // per_rank
        self.home = np.tile(contiguous, (len(self.layers), 1))  # [L, E]
        self._forwards: ForwardContext[MicroBatch] = ForwardContext()
        for layer, moe in enumerate(self.layers):
            keep_experts(moe.experts, slice(self.comm.rank * per_rank, (self.comm.rank + 1) * per_rank))
            moe.experts.dispatcher = self._dispatcher(layer)
            moe.router.replay = self._replay(layer)
        start_watchdog(self.comm, self.options.watchdog_seconds)
        self._weights_compared = False
        self._buffers = Buffers()
        self._counted: CountedLoads | None = None
        self._batch: OpenBatch | None = None
        self._last: OpenBatch | None = None

    @property
    def device(self) -> torch.device:
        return self.layers[0].experts.gate_up_proj.device

    def expert_parameters(self) -> list[nn.Parameter]:
        """This rank's experts: what FSDP2 (`ignored_params`) and DDP must leave alone."""
        return [parameter for moe in self.layers for _, parameter in expert_parameters(moe.experts)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """All other parameters of the model."""
        experts = {id(parameter) for parameter in self.expert_parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in experts]

    def gather_loads(
        self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int
    ) -> np.ndarray:
        """The load table of the expert-parallel group, int32 [L, M, R, E], from its ranks' sequences. Collective."""
        local, problem = np.zeros(0), None
        try:
            check_trace(trace, self.layers, self.num_experts)
            local = count_loads(trace, micro_batch_of_sequence, num_micro_batches)
        except ReLibraError as error:
            problem = error
        facts = {"num_micro_batches": num_micro_batches}
        self.groups.agree(problem, facts, self.device, "counting the loads")
        everyone = self.comm.gather_arrays(local, self.device, "the exchange of loads")  # [R, L, M, E]
        return np.ascontiguousarray(everyone.transpose(1, 2, 0, 3))

    def plan(self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int) -> BatchPlan:
        """Plan a batch, starting from where the experts are now. Collective; the same plan on every rank.

        With several expert-parallel groups, `home` is that of all groups' loads and replicas are this group's.
        """
        with ThreadPoolExecutor(1) as here:
            return self.plan_later(trace, micro_batch_of_sequence, num_micro_batches, here).result()

    def plan_later(
        self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int, executor: Executor
    ) -> "Future[BatchPlan]":
        """`plan` in a thread or process of `executor`, while the last rollouts finish. Collective until it returns.

        Every rank plans from the same loads and the placement of now, so it must run before the next batch opens.
        Processes must be spawned (`mp_context=multiprocessing.get_context("spawn")`): a fork of a rank inherits the
        locks of its threads. They need neither a process group nor a GPU.
        """
        loads = self.gather_loads(trace, micro_batch_of_sequence, num_micro_batches)
        self._counted = CountedLoads(trace, np.array(micro_batch_of_sequence), loads)
        everyone = self.groups.gather_over_copies(loads, self.device)  # [groups, L, M, R, E]
        arguments = (everyone, self.groups.copy, self.cluster, self.home.copy(), self.model_name)
        return executor.submit(plan_group, *arguments)

    @contextmanager
    def batch(
        self,
        plan: BatchPlan,
        trace: RoutingTrace,
        micro_batch_of_sequence: np.ndarray,
        optimizer: torch.optim.Optimizer | None,
    ) -> Iterator[None]:
        """Run a batch under `plan`: check it, move the experts to their homes, fetch the guests that stay. Collective.

        Leaving it returns the gradients of those guests, so `reduce_gradients` and `optimizer.step()` come after it.

        Args:
            trace: the recorded routing of this rank's sequences. A row of -1 at the end of its sequence visits no
                expert; others are routed live.
            micro_batch_of_sequence: int [sequences of this rank].
            optimizer: whose state moves with the experts; None where the experts are not trained.

        Raises: PlanError for a plan made for another model, cluster, or routing; InputError for a trace or optimizer
            that does not fit, on this rank or another, and, when the first batch opens, for weights that differ between
            ranks. Nothing has moved then. On leaving, InputError where tokens chose other experts than recorded and
            there was no room for them.
        """
        tensors: list[dict[str, Tensor]] = []
        problem: ReLibraError | None = None
        groups = np.asarray(micro_batch_of_sequence)
        try:
            if self._batch is not None:
                raise InputError("a batch is open already: leave it before the next begins")
            check_plan(plan, self.layers, self.num_experts, self.cluster, self.model_name)
            check_optimizer(optimizer, self.layers)
            tensors = [tensors_to_move(moe.experts, optimizer) for moe in self.layers]
        except ReLibraError as error:
            problem = error
        counted = self._counted is not None and self._counted.fits(trace, groups, plan)
        known = self._agree(problem, plan, tensors, counted)
        if not self._weights_compared:
            check_same_weights(self.model, self.layers, self.groups, self.device)
            self._weights_compared = True
        if not known or self._counted is None:
            loads = self.gather_loads(trace, groups, plan.num_micro_batches)
        else:
            loads = self._counted.loads
        self._counted = None
        try:
            replace(plan, loads=loads)  # refuses other loads, which are the same on every rank of a group
        except ReLibraError as error:
            problem = error
        self.groups.agree(problem, {}, self.device, "checking the loads")
        session = Session(self.options, self.comm.ledger)
        self.comm.ledger.begin_batch()
        with self.comm.ledger.span("migration", self.device):
            for layer in range(len(self.layers)):
                move_experts(self.comm, tensors[layer], self.home[layer], plan.home[layer], f"layer {layer}")
                self.home[layer] = plan.home[layer]
        del tensors
        batch = OpenBatch(session, self.groups, plan, loads, trace, groups, self.layers, self._buffers)
        self._batch = self._last = batch
        try:
            yield
            batch.finish()
        finally:
            batch.close()
            self._batch = None

    @contextmanager
    def micro_batch(self, index: int, rows: np.ndarray | None = None) -> Iterator[None]:
        """Forwards within belong to this micro-batch: routers replay, experts are reached where the plan has them.

        Every rank must open every micro-batch, also one in which it has no tokens, in the same order. Backward may run
        within or later, before the batch is closed, in any order that all ranks share and in any thread; blocks may be
        checkpointed. A micro-batch may be opened again, for passes without gradients too.

        Args:
            rows: int [tokens of the model's input], which of the micro-batch's trace rows (its sequences in trace
                order) each token is; -1 for padding, which visits no expert. None: the input is exactly those rows.
        """
        if self._batch is None:
            raise InputError("micro_batch is used outside of batch: open `with ep.batch(plan, ...)` first")
        count = self._batch.plan.num_micro_batches
        if not isinstance(index, int | np.integer) or not 0 <= index < count:
            raise InputError(f"index is {index!r}; the plan has micro-batches 0..{count - 1}")
        if self._forwards.open is not None:
            raise InputError("a micro-batch is open already: leave it before the next begins")
        with self._forwards.entered(self._batch.micro_batch(int(index), rows)):
            yield

    def reduce_gradients(self, *, dense: bool = True) -> None:
        """Reduce gradients over the ranks, in place, by `reduction`. Collective; after the batch is left.

        Expert gradients are whole within their group already: every rank's tokens came to them. They are summed over
        the groups. Sharded gradients (FSDP2) are left as they are.

        Args:
            dense: False where DDP reduces everything but the experts.
        """
        scale = 1.0 if self.reduction == "sum" else 1.0 / self.groups.num_ranks
        experts = [p for p in self.expert_parameters() if p.requires_grad]
        gradients.reduce_dense(self.groups.copies, experts, scale, self.device)
        if dense:
            whole = [p for p in self.dense_parameters() if p.requires_grad and not isinstance(p, DTensor)]
            gradients.reduce_dense(self.groups.all, whole, scale, self.device)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the whole model, experts of all ranks included, to one norm. Collective.

        Returns: the norm before, 0-d, the same on every rank.
        """
        experts, dense = self.expert_parameters(), self.dense_parameters()
        norm = gradients.total_norm(self.comm, experts, dense, self.device)
        gradients.clip([*experts, *dense], norm, max_norm)
        return norm

    def named_logical_parameters(
        self, tensor_of: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.data
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter under its name in the whole model, experts [E, ...] in logical order. Collective.

        One tensor is gathered at a time, so that a rollout engine can be fed after every step. `model.state_dict()` has
        this rank's experts only, in the order of its home slots.

        Args:
            tensor_of: what to give for each parameter instead of its data, such as its gradient.
        """
        return logical_tensors(self.model, self.layers, self.home, self.comm, tensor_of)

    def save_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write parameters, buffers and optimizer state to a new folder, whole or not at all. Collective.

        It depends neither on the placement nor on the number of ranks; `torch.distributed.checkpoint` reads it.
        """
        self._check_between_batches("save_checkpoint")
        state = checkpoint.training_state(self.model, self.layers, self.home, self.comm, optimizer)
        checkpoint.save(path, state, self.groups, self.device)

    def load_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read what `save_checkpoint` wrote into the model and a new or used optimizer, in place. Collective.

        Any number of ranks and any placement will do. Hyper-parameters of the optimizer are not part of a checkpoint.
        Raises: FormatError where there is no checkpoint, or it is of another model or optimizer.
        """
        self._check_between_batches("load_checkpoint")
        if optimizer is not None:
            checkpoint.make_optimizer_state(optimizer)
        state = checkpoint.training_state(self.model, self.layers, self.home, self.comm, optimizer)
        checkpoint.load(path, state, self.groups)
        if optimizer is not None:
            checkpoint.restore_numbers(self.model, optimizer, state)

    def _check_between_batches(self, what: str) -> None:
        if self._batch is not None:
            raise InputError(f"{what} is used within a batch: leave it first")

    def stats(self) -> dict[str, Any]:
        """What the last batch did on this rank: loads, seconds by part, bytes by kind and network. Collective.

        Raises: InputError before the first batch.
        """
        if self._last is None:
            raise InputError("stats needs a batch: there was none yet")
        return self._last.stats()

    def stats_line(self) -> str:
        """`stats` as one line of JSON, for a log with a line for each batch. Collective."""
        return json_line(self.stats())

    def _agree(
        self, problem: ReLibraError | None, plan: BatchPlan, tensors: list[dict[str, Tensor]], counted: bool
    ) -> bool:
        """All ranks go on from the same; returns whether every one has the loads already."""
        common = {
            "the model": model_digest(self.layers),
            "the placement": checksum(self.home),
            "the plan's placement": checksum(plan.home),
            "the configuration": checksum(self.cluster, self.options, self.reduction, self.groups.shape),
            "the optimizer's state": checksum([list(layer) for layer in tensors]),
        }
        own = {"the plan": checksum(plan.home, plan.replicas, plan.quota, plan.guests)}
        return self.groups.agree(problem, common, self.device, "opening the batch", own, counted)

    def _dispatcher(self, layer: int) -> Callable[[ReplicatedExperts, Tensor, Tensor, Tensor], Tensor]:
        def dispatch(experts: ReplicatedExperts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return self._forwards.find(f"MoE layer {layer}").run(layer, experts, x_TH, index_TK, weights_TK)

        return dispatch

    def _replay(self, layer: int) -> Callable[[], tuple[Tensor, bool]]:
        return lambda: self._forwards.find(f"MoE layer {layer}").recorded(layer)
