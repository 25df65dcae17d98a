"""Batches under a plan, for a model that was loaded with `ep_implementation="relibra"`: plan, open, micro-batches."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import nn

from ...parallel.digests import checksum
from ...parallel.microbatch import MicroBatch
from ...parallel.tokens.tables import MicroBatchTables, Tables
from ...planner import BatchPlan, ClusterSpec, PlanOptions, RoutingTrace, count_loads, plan_batch
from ...planner.errors import InputError, PlanError, ReLibraError
from ...planner.plan import contiguous_home
from .expert_parallel import Batch, RelibraEP, collective_device, communication, implementations_of, shared_parts
from .fed import Fed
from .feeder import Feeder
from .layers import check_trace, moe_layers
from .replay import checked_rows, fed_by_forwards
from .routers import replaying_routers

_OPEN: list[Batch] = []


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
    implementations = implementations_of(model)
    comm = implementations[0].comm
    device = collective_device(comm)
    problem: ReLibraError | None = None
    try:
        if _OPEN:
            raise InputError("a batch is open already: leave it before the next begins")
        if (trace is None) != (micro_batch_of_sequence is None):
            raise InputError("trace and micro_batch_of_sequence go together: give both or none")
        _check_plan(plan, implementations)
    except ReLibraError as error:
        problem = error
    facts = {
        "the plan": checksum(plan.home, plan.replicas, plan.quota, plan.kept),
        "having a trace": trace is not None,
    }
    comm.agree(problem, facts, device, "opening the batch")
    comm.gpus_per_node = plan.gpus_per_node
    opened = Batch(model, plan, comm, device)
    if trace is not None and micro_batch_of_sequence is not None:
        groups = np.asarray(micro_batch_of_sequence)
        loads = _gather_loads(model, trace, groups, plan.num_micro_batches)
        dataclasses.replace(plan, loads=loads)  # refuses other loads, which are the same on every rank
        opened.tables = Tables(comm, plan, loads, trace, groups, device)
        opened.parts = shared_parts(comm, plan, opened.weights.__getitem__, device)
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
def _replayed(opened: Batch, index: int, rows: np.ndarray | None) -> Iterator[None]:
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
    device = collective_device(comm)
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
