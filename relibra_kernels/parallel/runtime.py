"""ExpertParallel: train a model whose MoE layers live on many ranks, under a plan."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn import ReplicatedExperts, ReplicatedMoE, replay_routing
from ..planner import BatchPlan, ClusterSpec, RoutingTrace, count_loads, plan_batch
from ..planner.errors import InputError, PlanError, ReLibraError
from .comm import Comm
from .layer import ExpertParallelMLP
from .migration import expert_tensors, move_experts
from .tables import MicroBatch, MicroBatchTables, make_tables

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


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
        optimizer.step()

    where `trace` holds this rank's sequences. Losses must be normalised over all ranks: gradients are summed.

    Args:
        model: holds one or more `ReplicatedMoE`, in layer order.
        cluster: `num_nodes * gpus_per_node` must be the size of the group.
        group: the expert-parallel process group; None = the default group.
        model_name: written into plans; a plan for another model is refused.

    Raises: InputError where the model has no such layer, or its experts do not divide over the ranks.
    """

    def __init__(
        self, model: nn.Module, cluster: ClusterSpec, *, group: dist.ProcessGroup | None = None, model_name: str = ""
    ):
        self.model, self.cluster, self.model_name = model, cluster, model_name
        self.comm = Comm(group, cluster.gpus_per_node)
        self.layers = [module for module in model.modules() if isinstance(module, ReplicatedMoE)]
        if not self.layers:
            raise InputError(f"model {type(model).__name__} has no ReplicatedMoE: replace its MoE blocks first")
        if self.comm.size != cluster.num_ranks:
            raise InputError(f"cluster has {cluster.num_ranks} ranks, the process group {self.comm.size}")
        counts = {moe.experts.num_experts for moe in self.layers}
        if len(counts) > 1 or any(moe.experts.dispatcher is not None for moe in self.layers):
            raise InputError(f"every MoE layer must have all of its experts, equally many; they have {sorted(counts)}")
        self.num_experts = counts.pop()
        per_rank = cluster.experts_per_rank(self.num_experts)
        contiguous = np.arange(self.num_experts, dtype=np.int32) // per_rank
        self.home = np.tile(contiguous, (len(self.layers), 1))  # [L, E]
        for layer, moe in enumerate(self.layers):
            _keep_experts(moe.experts, slice(self.comm.rank * per_rank, (self.comm.rank + 1) * per_rank))
            moe.experts.dispatcher = self._dispatcher(layer)
        self._plan: BatchPlan | None = None
        self._tables: list[MicroBatchTables] = []
        self._micro_batch: MicroBatch | None = None

    @property
    def device(self) -> torch.device:
        return self.layers[0].experts.gate_up_proj.device

    def gather_loads(
        self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int
    ) -> np.ndarray:
        """The load table of the whole group, int32 [L, M, R, E], from every rank's own sequences. Collective."""
        local, problem = np.zeros(0), None
        try:
            self._check_trace(trace)
            local = count_loads(trace, micro_batch_of_sequence, num_micro_batches)
        except ReLibraError as error:
            problem = error
        self.comm.agree(problem, {"num_micro_batches": num_micro_batches}, self.device, "counting the loads")
        everyone = self.comm.gather_arrays(local, self.device, "the exchange of loads")  # [R, L, M, E]
        return np.ascontiguousarray(everyone.transpose(1, 2, 0, 3))

    def plan(self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int) -> BatchPlan:
        """Plan a batch, starting from where the experts are now. Collective; the same plan on every rank."""
        loads = self.gather_loads(trace, micro_batch_of_sequence, num_micro_batches)
        return plan_batch(loads, self.cluster, previous_home=self.home, model=self.model_name)

    @contextmanager
    def batch(
        self,
        plan: BatchPlan,
        trace: RoutingTrace,
        micro_batch_of_sequence: np.ndarray,
        optimizer: torch.optim.Optimizer | None,
    ) -> Iterator[None]:
        """Run a batch under `plan`: check it, move the experts to their homes, make the tables. Collective.

        Args:
            trace: the recorded routing of this rank's sequences, last tokens unknown.
            micro_batch_of_sequence: int [sequences of this rank].
            optimizer: whose state moves with the experts; None where the experts are not trained.

        Raises: PlanError for a plan made for another model, cluster, or routing; InputError for a trace or optimizer
            that does not fit, on this rank or another. Nothing has moved then.
        """
        tensors, problem = [], None
        try:
            self._check_plan(plan)
            self._check_optimizer(optimizer)
            tensors = [self._tensors_to_move(moe.experts, optimizer) for moe in self.layers]
        except ReLibraError as error:
            problem = error
        facts = {
            "the plan": _checksum(plan.home, plan.replicas, plan.quota, plan.guests),
            "the optimizer's state": zlib.crc32(repr([list(layer) for layer in tensors]).encode()),
        }
        self.comm.agree(problem, facts, self.device, "opening the batch")
        loads = self.gather_loads(trace, micro_batch_of_sequence, plan.num_micro_batches)
        dataclasses.replace(plan, loads=loads)  # refuses other loads, which are the same on every rank
        for layer in range(len(self.layers)):
            move_experts(self.comm, tensors[layer], self.home[layer], plan.home[layer], f"layer {layer}")
            self.home[layer] = plan.home[layer]
        groups = np.asarray(micro_batch_of_sequence)
        self._tables = make_tables(self.comm, plan, loads, trace, groups, self.device)
        self._plan = plan
        try:
            yield
        finally:
            self._plan, self._tables = None, []

    @contextmanager
    def micro_batch(self, index: int, rows: np.ndarray | None = None) -> Iterator[None]:
        """Run one micro-batch, forward and backward: routers replay, experts are reached where the plan has them.

        Every rank must run every micro-batch, also one in which it has no tokens. Backward belongs inside: where blocks
        are checkpointed, it runs their forward again.

        Args:
            rows: int [tokens of the model's input], which of the micro-batch's trace rows (its sequences in trace
                order) each token is; -1 for padding, which visits no expert. None: the input is exactly those rows.
        """
        if self._plan is None:
            raise InputError("micro_batch is used outside of batch: open `with ep.batch(plan, ...)` first")
        if not isinstance(index, int | np.integer) or not 0 <= index < self._plan.num_micro_batches:
            raise InputError(f"index is {index!r}; the plan has micro-batches 0..{self._plan.num_micro_batches - 1}")
        if self._micro_batch is not None:
            raise InputError("a micro-batch is open already: leave it before the next begins")
        micro_batch = MicroBatch(self.comm, self._plan, self._tables[index], index, rows, self.device)
        routers = [moe.router for moe in self.layers]
        with ExitStack() as stack:
            stack.enter_context(replay_routing(routers, torch.from_numpy(micro_batch.expert_ids)))
            self._micro_batch = micro_batch
            try:
                yield
            finally:
                self._micro_batch = None

    def reduce_gradients(self) -> None:
        """Sum the gradients of everything but the experts over the ranks, in place. Collective.

        Expert gradients are whole already: every rank's tokens came to them. A parameter without a gradient on any rank
        stays without one.
        """
        experts = {id(parameter) for moe in self.layers for _, parameter in _expert_parameters(moe.experts)}
        dense = [p for p in self.model.parameters() if p.requires_grad and id(p) not in experts]
        present = torch.tensor([float(p.grad is not None) for p in dense], device=self.device)
        self.comm.all_reduce(present, "the reduction of dense gradients")
        used = [p for p, count in zip(dense, present.tolist(), strict=True) if count]
        for dtype in dict.fromkeys(p.dtype for p in used):  # the same order on every rank
            same = [p for p in used if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in same])
            self.comm.all_reduce(flat, "the reduction of dense gradients")
            for parameter, summed in zip(same, flat.split([p.numel() for p in same]), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(summed.view_as(parameter))

    def named_logical_parameters(
        self, tensor_of: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.data
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter under its name in the whole model, experts [E, ...] in logical order. Collective.

        `model.state_dict()` has this rank's experts only, in the order of its home slots.

        Args:
            tensor_of: what to give for each parameter instead of its data, such as its gradient.
        """
        layer_of = {
            id(parameter): layer
            for layer, moe in enumerate(self.layers)
            for _, parameter in _expert_parameters(moe.experts)
        }
        for name, parameter in self.model.named_parameters():
            tensor = tensor_of(parameter)
            if tensor is None or id(parameter) not in layer_of:
                yield name, tensor
                continue
            by_rank = self.comm.gather_tensors(tensor, f"gathering {name}")
            order = torch.from_numpy(np.argsort(self.home[layer_of[id(parameter)]], kind="stable")).to(tensor.device)
            yield name, torch.empty_like(by_rank.flatten(0, 1)).index_copy_(0, order, by_rank.flatten(0, 1))

    def _dispatcher(self, layer: int) -> Callable[[ReplicatedExperts, Tensor, Tensor, Tensor], Tensor]:
        def dispatch(experts: ReplicatedExperts, x_TH: Tensor, _index: Tensor, weights_TK: Tensor) -> Tensor:
            current = self._micro_batch
            if current is None:
                raise InputError(f"MoE layer {layer} runs outside of a micro-batch: use `with ep.micro_batch(m)`")
            if len(x_TH) != current.num_tokens:
                raise InputError(
                    f"MoE layer {layer} got {len(x_TH)} tokens; the micro-batch's routing is for {current.num_tokens}"
                )
            return ExpertParallelMLP.apply(
                x_TH.contiguous(),
                weights_TK,
                current.sites[layer],
                experts.form,
                experts.recompute,
                *experts.weights,
            )

        return dispatch

    def _check_trace(self, trace: RoutingTrace) -> None:
        top_k = self.layers[0].router.top_k
        shape = (trace.num_layers, trace.top_k, trace.num_experts)
        if shape != (len(self.layers), top_k, self.num_experts):
            raise InputError(
                f"trace has (layers, top-k, experts) {shape}; the model has {len(self.layers), top_k, self.num_experts}"
            )
        if not trace.only_last_tokens_unknown:
            raise InputError(
                "trace leaves tokens unrecorded that are not the last of their sequence; under expert parallelism the "
                "routing of every other token must be known"
            )

    def _check_plan(self, plan: BatchPlan) -> None:
        if self._plan is not None:
            raise InputError("a batch is open already: leave it before the next begins")
        if plan.model and self.model_name and plan.model != self.model_name:
            raise PlanError(f"plan is for model {plan.model!r}; this is {self.model_name!r}")
        shape = (plan.num_layers, plan.num_experts, plan.num_ranks, plan.gpus_per_node)
        expected = (len(self.layers), self.num_experts, self.comm.size, self.cluster.gpus_per_node)
        if shape != expected:
            raise PlanError(f"plan is for (layers, experts, ranks, GPUs a node) {shape}; this run has {expected}")

    def _check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            return
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for layer, moe in enumerate(self.layers):
            for name, parameter in _expert_parameters(moe.experts):
                if parameter.requires_grad and id(parameter) not in trained:
                    raise InputError(
                        f"optimizer does not have {name} of MoE layer {layer}: it must be made after ExpertParallel, "
                        "which replaces the experts' parameters"
                    )

    @staticmethod
    def _tensors_to_move(experts: ReplicatedExperts, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        return {
            name: tensor
            for attribute, parameter in _expert_parameters(experts)
            for name, tensor in expert_tensors(parameter, attribute, optimizer).items()
        }


def _checksum(*arrays: np.ndarray) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(repr(array.shape).encode(), checksum))
    return checksum


def _expert_parameters(experts: ReplicatedExperts) -> list[tuple[str, nn.Parameter]]:
    pairs = [(attribute, getattr(experts, attribute)) for attribute in EXPERT_PARAMETERS]
    return [(attribute, parameter) for attribute, parameter in pairs if parameter is not None]


def _keep_experts(experts: ReplicatedExperts, kept: slice) -> None:
    """Replace each parameter of all experts by one of the kept ones."""
    for attribute, parameter in _expert_parameters(experts):
        local = nn.Parameter(parameter.detach()[kept].clone(), requires_grad=parameter.requires_grad)
        setattr(experts, attribute, local)
    experts.num_experts = kept.stop - kept.start
