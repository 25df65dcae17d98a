"""`DistributedConfig(ep_implementation="relibra")`: a model's experts over ranks, without a plan or under one.

transformers shards the experts by contiguous id and gives every layer its rows; what is ours is how rows and replicas
travel. Without a batch that is open, every layer exchanges its counts first, as transformers' own all-to-all does. In a
batch with a trace, all sizes are known before the step.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from ...parallel.buffers import Buffers
from ...parallel.comm import Comm
from ...parallel.guests import KeptGuests
from ...parallel.layer import ExpertParallelMLP, LayerSite
from ...parallel.microbatch import BatchParts, MicroBatch
from ...parallel.replicas import ReplicaPushes
from ...parallel.session import RuntimeOptions, Session
from ...parallel.tables import MicroBatchTables, Tables
from ...planner import BatchPlan, ClusterSpec, PlanOptions, RoutingTrace, count_loads, plan_batch
from ...planner.errors import InputError, PlanError, ReLibraError
from ...planner.plan import contiguous_home
from ...weights import ExpertWeights
from .experts import cast_for_experts, expert_form, expert_weights
from .layers import Fed, check_trace, moe_layers
from .replay import Feeder, checked_rows, fed_by_forwards, replaying_routers


class RelibraEP(EPImplementation):
    """The experts of one layer, reached by our dispatch; one instance a layer, as transformers makes them."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any):
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise InputError(
                f"tp_size is {tp_mesh.size()}; ep_implementation 'relibra' needs ranks that hold different tokens: set "
                "tp_size=1 and fsdp_size to the number of ranks"
            )
        self.experts, self.form = experts, expert_form(experts)
        group = ep_mesh.get_group()
        self.comm = _COMMS.setdefault(group, Comm(group, ep_mesh.size()))
        self.num_experts = self.num_local_experts * self.comm.size
        self.batch: _Batch | None = None
        self.layer = 0  # among the layers of the batch that is open
        _IMPLEMENTATIONS[experts] = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TH, weights = cast_for_experts(hidden_states, expert_weights(self.experts))
        site = self._site(top_k_index, weights)
        return ExpertParallelMLP.apply(x_TH, top_k_weights.contiguous(), site, self.form, False, *weights)

    def _site(self, top_k_index: Tensor, weights: ExpertWeights) -> LayerSite:
        batch = self.batch
        if batch is None:
            empty = np.zeros((self.comm.size, 0), np.int32)
            return _live_site(self.comm, top_k_index, self.num_experts, empty, empty, weights)
        if batch.micro_batch is None:
            raise InputError(f"MoE layer {self.layer} runs outside of a micro-batch: use `with micro_batch(m)`")
        if batch.tables is None:
            replicas, quota = (x[self.layer, batch.micro_batch] for x in (batch.plan.replicas, batch.plan.quota))
            return _live_site(self.comm, top_k_index, self.num_experts, replicas, quota, weights)
        if batch.current is None or batch.current.num_tokens != len(top_k_index):
            known = None if batch.current is None else batch.current.num_tokens
            raise InputError(
                f"MoE layer {self.layer} got {len(top_k_index)} tokens; micro-batch {batch.micro_batch} is for {known}"
            )
        batch.weights[self.layer] = weights
        return batch.current.sites(self.layer)[0]


EPImplementationInterface.register("relibra", RelibraEP)

_COMMS: dict[Any, Comm] = {}  # one a process group, so that all layers count their bytes together
_IMPLEMENTATIONS: "WeakKeyDictionary[nn.Module, RelibraEP]" = WeakKeyDictionary()


@dataclasses.dataclass
class _Batch:
    """What `batch` opened.

    `tables`, `parts`, `traces`: None where routing is live. `current`: the micro-batch where all sizes are known.
    `weights`: this rank's experts of every layer, as FSDP last gathered them.
    """

    model: nn.Module
    plan: BatchPlan
    comm: Comm
    device: torch.device
    traces: list[RoutingTrace] | None = None  # of each micro-batch, this rank's sequences
    tables: Tables | None = None
    parts: BatchParts | None = None
    weights: dict[int, ExpertWeights] = dataclasses.field(default_factory=dict)
    micro_batch: int | None = None
    current: MicroBatch | None = None


_OPEN: list[_Batch] = []


def communication(model: nn.Module) -> Comm:
    """The expert-parallel group of a model, which counts the bytes that travel, by kind."""
    return _implementations(model)[0].comm


def plan(
    model: nn.Module,
    trace: RoutingTrace,
    micro_batch_of_sequence: np.ndarray,
    num_micro_batches: int,
    *,
    replica_slots: int = 2,
    gpus_per_node: int | None = None,
) -> BatchPlan:
    """Plan a batch for a model whose experts stay where transformers put them. Collective; the same on every rank.

    Args:
        trace: the routing of this rank's sequences. micro_batch_of_sequence: int [sequences of this rank].
        gpus_per_node: ranks of the expert-parallel group that are on one node; None: all of them.
    """
    comm = communication(model)
    loads = _gather_loads(model, trace, micro_batch_of_sequence, num_micro_batches)
    per_node = gpus_per_node or comm.size
    if comm.size % per_node:
        raise InputError(f"gpus_per_node is {per_node}; it must divide the expert-parallel group of {comm.size}")
    cluster = ClusterSpec(comm.size // per_node, per_node, replica_slots)
    home = contiguous_home(loads.shape[0], loads.shape[-1], comm.size)
    return plan_batch(loads, cluster, previous_home=home, options=PlanOptions(max_moves=0))


@contextmanager
def batch(
    model: nn.Module,
    plan: BatchPlan,
    trace: RoutingTrace | None = None,
    micro_batch_of_sequence: np.ndarray | None = None,
) -> Iterator[None]:
    """Run a batch of a model that was loaded with `ep_implementation="relibra"` under `plan`. Collective.

    Args:
        trace, micro_batch_of_sequence: the routing of this rank's sequences and int [sequences]. With them the routers
            replay, and every size is known on the host before the step. Without them routing is as the routers (or a
            `replay`) have it, and every layer exchanges its counts; replicas then take at most what the plan says.

    Raises: PlanError for a plan that moves experts, or is for another model, group or routing; InputError.
    """
    implementations = _implementations(model)
    comm = implementations[0].comm
    device = _device(comm)
    problem: ReLibraError | None = None
    try:
        if _OPEN:
            raise InputError("a batch is open already: leave it before the next begins")
        if (trace is None) != (micro_batch_of_sequence is None):
            raise InputError("trace and micro_batch_of_sequence go together: give both or none")
        _check_plan(plan, implementations)
    except ReLibraError as error:
        problem = error
    checksum = 0
    for array in (plan.home, plan.replicas, plan.quota, plan.guests):
        checksum = zlib.crc32(array.tobytes(), checksum)
    comm.agree(problem, {"the plan": checksum, "having a trace": trace is not None}, device, "opening the batch")
    comm.gpus_per_node = plan.gpus_per_node
    opened = _Batch(model, plan, comm, device)
    if trace is not None and micro_batch_of_sequence is not None:
        groups = np.asarray(micro_batch_of_sequence)
        loads = _gather_loads(model, trace, groups, plan.num_micro_batches)
        dataclasses.replace(plan, loads=loads)  # refuses other loads, which are the same on every rank
        opened.tables = Tables(comm, plan, loads, trace, groups, device)
        opened.parts = _parts(comm, plan, opened.weights.__getitem__, device)
        opened.traces = [trace.select(np.flatnonzero(groups == m)) for m in range(plan.num_micro_batches)]
    _OPEN.append(opened)
    for layer, implementation in enumerate(implementations):
        implementation.batch, implementation.layer = opened, layer
    try:
        yield
    finally:
        _OPEN.remove(opened)
        if opened.tables is not None and opened.parts is not None:
            opened.tables.close()
            opened.parts.session.is_open = False
        for implementation in implementations:
            implementation.batch = None


@contextmanager
def micro_batch(index: int, rows: np.ndarray | None = None) -> Iterator[None]:
    """Run one micro-batch of the batch that is open, forward and backward. Every rank must run every micro-batch.

    Args:
        rows: int [tokens fed], the row of each token in the micro-batch's trace (its sequences in trace order), -1 for
            padding; None: the forward is fed those sequences whole, padded (the attention mask says where) or packed.
    """
    if not _OPEN:
        raise InputError("micro_batch is used outside of batch: open `with batch(model, plan)` first")
    opened = _OPEN[-1]
    if not isinstance(index, int | np.integer) or not 0 <= index < opened.plan.num_micro_batches:
        raise InputError(f"index is {index!r}; the plan has micro-batches 0..{opened.plan.num_micro_batches - 1}")
    if opened.micro_batch is not None:
        raise InputError("a micro-batch is open already: leave it before the next begins")
    with ExitStack() as stack:
        if opened.traces is None:
            if rows is not None:
                raise InputError("rows are of a trace, and the batch was opened without one")
        else:
            stack.enter_context(_replayed(opened, int(index), rows))
        opened.micro_batch = int(index)
        try:
            yield
        finally:
            opened.micro_batch, opened.current = None, None


@contextmanager
def _replayed(opened: _Batch, index: int, rows: np.ndarray | None) -> Iterator[None]:
    assert opened.traces is not None and opened.tables is not None and opened.parts is not None
    parts, trace, layers = opened.parts, opened.traces[index], moe_layers(opened.model)
    tables: MicroBatchTables = opened.tables.get(index)
    feeder = Feeder(trace, layers, None)

    def use(rows_T: np.ndarray) -> None:
        opened.current = MicroBatch(parts, tables, index, rows_T)

    def feed(fed: Fed) -> None:
        use(feeder.feed(fed))

    with ExitStack() as stack:
        if rows is not None:
            use(checked_rows(rows, trace))
            feeder.use_rows(np.asarray(rows))
        else:
            stack.enter_context(fed_by_forwards(opened.model, feed))
        stack.enter_context(replaying_routers(layers, feeder))
        yield


def _parts(comm: Comm, plan: BatchPlan, weights_of: Callable[[int], ExpertWeights], device: torch.device) -> BatchParts:
    """What layers share. FSDP gathers a layer's weights when it runs: nothing is fetched ahead, and no guest stays."""
    guests = KeptGuests(comm, plan, weights_of, np.zeros_like(plan.guests))
    pushes = ReplicaPushes(comm, weights_of, guests.weights)
    session = Session(RuntimeOptions(), comm.ledger)
    return BatchParts(session, comm, plan, pushes, guests, Buffers(), device, fetch_ahead=False)


def _live_site(
    comm: Comm,
    top_k_index: Tensor,
    num_experts: int,
    replicas_RS: np.ndarray,
    quota_RS: np.ndarray,
    weights: ExpertWeights,
) -> LayerSite:
    """The site of one layer whose routing was not known before: counts and slots are exchanged now. Collective."""
    device = top_k_index.device
    ids_TLK = top_k_index.numpy(force=True)[:, None].astype(np.int16)
    trace = RoutingTrace(ids_TLK, np.array([0, len(ids_TLK)]), num_experts, (0,))
    groups = np.zeros(1, np.int64)
    loads_RE = comm.gather_arrays(count_loads(trace, groups, 1)[0, 0], device, "the exchange of live loads")
    guests = replicas_RS >= 0  # whatever is held is allowed: the plan was checked when the batch was opened
    live = BatchPlan(
        home=contiguous_home(1, num_experts, comm.size),
        replicas=replicas_RS[None, None],
        quota=_at_most(replicas_RS, quota_RS, loads_RE.sum(0))[None, None],
        guests=guests[None],
        gpus_per_node=comm.gpus_per_node,
    )
    tables = Tables(comm, live, loads_RE[None, None], trace, groups, device)
    try:
        known = tables.get(0)
    finally:
        tables.close()
    return MicroBatch(_parts(comm, live, lambda _: weights, device), known, 0, None).sites(0)[0]


def _at_most(replicas_RS: np.ndarray, quota_RS: np.ndarray, loads_E: np.ndarray) -> np.ndarray:
    """Quotas cut down to what the experts have, first come first served by rank and slot."""
    left, capped = loads_E.astype(np.int64), np.zeros_like(quota_RS)
    for rank, slot in np.argwhere(quota_RS > 0):
        expert = replicas_RS[rank, slot]
        capped[rank, slot] = min(quota_RS[rank, slot], left[expert])
        left[expert] -= capped[rank, slot]
    return capped


def _implementations(model: nn.Module) -> list[RelibraEP]:
    found = [_IMPLEMENTATIONS[module] for module in model.modules() if module in _IMPLEMENTATIONS]
    if not found:
        raise InputError(
            f"model {type(model).__name__} has no experts under ep_implementation 'relibra': load it with "
            "from_pretrained(..., distributed_config=DistributedConfig(ep_size=..., ep_implementation='relibra'))"
        )
    return found


def _device(comm: Comm) -> torch.device:
    """Where this group's collectives want their tensors."""
    on_gpu = "nccl" in dist.get_backend(comm.group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _check_plan(plan: BatchPlan, implementations: list[RelibraEP]) -> None:
    comm = implementations[0].comm
    shape = (plan.num_layers, plan.num_experts, plan.num_ranks)
    expected = (len(implementations), implementations[0].num_experts, comm.size)
    if shape != expected:
        raise PlanError(f"plan is for (layers, experts, ranks) {shape}; this model on its group has {expected}")
    moved = plan.home != contiguous_home(*expected)
    if moved.any():
        layer, expert = (int(x) for x in np.argwhere(moved)[0])
        raise PlanError(
            f"plan has expert {expert} of layer {layer} at home on rank {plan.home[layer, expert]}, but transformers "
            "shards experts by id: moved ones would be saved under the ids of others. Plan with "
            "relibra_kernels.integrations.transformers.plan, or with PlanOptions(max_moves=0) and a contiguous "
            "previous_home; to reorder experts, use ExpertParallel"
        )


def _gather_loads(
    model: nn.Module, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int
) -> np.ndarray:
    """The load table of the whole group, int32 [L, M, R, E], from every rank's own sequences. Collective."""
    comm = communication(model)
    device = _device(comm)
    local, problem = np.zeros(0), None
    try:
        check_trace(trace, moe_layers(model))
        if not trace.only_last_tokens_unknown:
            raise InputError(
                "trace leaves tokens unrecorded that are not the last of their sequence: open the batch without a "
                "trace, inside of `replay(model, trace)`, which routes them live"
            )
        local = count_loads(trace, micro_batch_of_sequence, num_micro_batches)
    except ReLibraError as error:
        problem = error
    comm.agree(problem, {"num_micro_batches": num_micro_batches}, device, "counting the loads")
    everyone = comm.gather_arrays(local, device, "the exchange of loads")
    return np.ascontiguousarray(everyone.transpose(1, 2, 0, 3))
