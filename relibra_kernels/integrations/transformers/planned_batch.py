"""Batches under a plan, for a model that was loaded with `ep_implementation="relibra"`: plan, open, micro-batches."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import nn

from ...alignment import Shift
from ...parallel.batch import ExpertStore, OpenBatch
from ...parallel.comm.alarm import Alarm
from ...parallel.digests import checksum
from ...parallel.live import LiveRouting
from ...parallel.planning import Planning
from ...parallel.routed_batch import RoutedBatch, routed_batch
from ...parallel.running import ModelRunner
from ...parallel.session import RuntimeOptions, Session
from ...parallel.transports import chosen_transport, make_transport
from ...planner import BatchPlan, ClusterSpec, ModelShape, PlanOptions, RoutingTrace
from ...planner.errors import InputError, PlanError, ReLibraError
from ...planner.plan import contiguous_home
from ...planner.pricing.models import shape_of_sizes
from ...weights import ExpertWeights
from .expert_parallel import RelibraEP, implementations_of, runner_of_open_batch
from .fed_tokens import Fed
from .moe_layers import MoeLayer, check_trace_of_model, moe_layers
from .replay import checked_rows, fed_by_forwards
from .replayed_rows import Feeder
from .routers import replaying_routers


def plan(
    model: nn.Module,
    trace: RoutedBatch | RoutingTrace,
    micro_batch_of_sequence: np.ndarray | None = None,
    num_micro_batches: int | None = None,
    *,
    replica_slots: int = 2,
    gpus_per_node: int | None = None,
    transport: str = "auto",
    options: PlanOptions | None = None,
) -> BatchPlan:
    """Plan a batch for a model whose experts stay where transformers put them. Collective; the same on every rank.

    Args:
        trace: the routed batch; or the trace of this rank's sequences, int [sequences] `micro_batch_of_sequence` and
            `num_micro_batches`.
        gpus_per_node: ranks of the expert-parallel group that are on one node; None: all of them.
        transport: that of the batch, for which the plan is priced: as in `RuntimeOptions`.
        options: what the plan is to achieve, and at what price; experts never move.
    """
    implementations = implementations_of(model)
    first = implementations[0]
    comm = first.groups.experts
    per_node = gpus_per_node or comm.size
    if comm.size % per_node:
        raise InputError(f"gpus_per_node is {per_node}; it must divide the expert-parallel group of {comm.size}")
    cluster = ClusterSpec(comm.size // per_node, per_node, replica_slots)
    batch, problem = _routed(first, trace, micro_batch_of_sequence, num_micro_batches)
    home = contiguous_home(len(implementations), first.num_experts, comm.size)
    wanted = dataclasses.replace(options or PlanOptions(), max_moves=0)
    name = _transport_name(model, first, cluster, RuntimeOptions(transport=transport))
    return _planning(model, first, cluster, name).plan(batch, problem, home, wanted)


@contextmanager
def batch(
    model: nn.Module,
    plan: BatchPlan,
    trace: RoutedBatch | RoutingTrace | None = None,
    micro_batch_of_sequence: np.ndarray | None = None,
    *,
    on_shift: Shift | None = None,
    transport: str = "auto",
) -> Iterator[None]:
    """Run a batch of a model that was loaded with `ep_implementation="relibra"` under `plan`. Collective.

    Args:
        trace: the routed batch; or the trace of this rank's sequences, with int [sequences] `micro_batch_of_sequence`.
            With it the routers replay, and every size is known on the host before a layer runs. Without it routing is
            as the routers (or a `replay`) have it, and every layer exchanges its counts; an expert's home and its
            replicas then share its tokens alike.
        on_shift: what to do where the record is not what the model would choose: as in `RuntimeOptions`.
        transport: how tokens travel between the plan's nodes: as in `RuntimeOptions`. Outside of a batch they take one
            hop.

    Raises: PlanError for a plan that moves experts, or is for another model, group or routing; InputError.
    """
    implementations = implementations_of(model)
    first = implementations[0]
    groups, device = first.groups, first.groups.experts.device
    comm, routed, options = groups.experts, None, RuntimeOptions(on_shift=on_shift, transport=transport)
    problem: ReLibraError | None = None
    try:
        if first.runner is not None:
            raise InputError("a batch is open already: leave it before the next begins")
        if trace is not None and not isinstance(trace, RoutedBatch) and micro_batch_of_sequence is None:
            raise InputError("trace and micro_batch_of_sequence go together: give both or none")
        _check_plan(plan, implementations)
        if trace is not None:
            routed, problem = _routed(first, trace, micro_batch_of_sequence, plan.num_micro_batches)
    except ReLibraError as error:
        problem = error
    facts = {
        "the plan": checksum(plan.home, plan.replicas, plan.quota, plan.kept),
        "having a trace": trace is not None,
    }
    groups.agree(problem, facts, device, "opening the batch")
    for each in (comm, groups.side, groups.host):
        each.gpus_per_node = plan.gpus_per_node
    cluster = ClusterSpec(plan.num_ranks // plan.gpus_per_node, plan.gpus_per_node, plan.num_slots)
    name = _transport_name(model, first, cluster, options)
    way = make_transport(name, groups, cluster, _shape_of(moe_layers(model), first))
    comm.alarm = comm.alarm or Alarm(comm.ranks)
    for each in groups.every:
        each.alarm = comm.alarm
    loads = None
    if routed is not None:
        planning = _planning(model, first, cluster, name)
        loads = planning.gather_loads(routed)
        planning.check_made_for(plan, loads)
    session = Session(options, comm.ledger)
    runner = ModelRunner(LiveRouting(way, plan.home, options), model)
    store = ExpertStore(lambda layer: _weights_of(implementations[layer]), len(implementations), None, device)
    opened = OpenBatch(session, groups, plan, loads, routed, store, way)
    comm.alarm.begin()
    for layer, implementation in enumerate(implementations):
        implementation.runner, implementation.layer = runner, layer
    try:
        with runner.running(opened):
            yield
    finally:
        for implementation in implementations:
            implementation.runner, implementation.weights = None, None


@contextmanager
def micro_batch(index: int, rows: np.ndarray | None = None) -> Iterator[None]:
    """Run one micro-batch of the batch that is open, forward and backward. Every rank must run every micro-batch.

    Args:
        rows: int [tokens fed], the row of each token in the micro-batch's trace (its sequences in trace order), -1 for
            padding; None: the forward is fed those sequences whole, padded (the attention mask says where) or packed.
    """
    runner = runner_of_open_batch()
    if runner is None or runner.model is None:
        raise InputError("micro_batch is used outside of batch: open `with batch(model, plan)` first")
    opened, forwards, model = runner.open_batch(), runner.forwards, runner.model
    opened.check_index(index)
    if opened.routed is None:
        if rows is not None:
            raise InputError("rows are of a trace, and the batch was opened without one")
        with forwards.entered(opened.micro_batch(index, None)):
            yield
        return
    trace, layers = opened.routed.trace_of(index), moe_layers(model)
    feeder = Feeder(trace, layers, None)

    def feed(fed: Fed) -> None:
        forwards.current = opened.micro_batch(index, feeder.feed(fed))

    with ExitStack() as stack:
        stack.enter_context(replaying_routers(layers, feeder, opened.alignment))
        if rows is not None:
            feeder.use_rows(checked_rows(rows, trace))
            stack.enter_context(forwards.entered(opened.micro_batch(index, np.asarray(rows))))
        else:
            stack.enter_context(fed_by_forwards(model, feed))
            stack.enter_context(forwards.entered(None))
        yield


def _routed(
    implementation: RelibraEP,
    trace: RoutedBatch | RoutingTrace,
    micro_batch_of_sequence: np.ndarray | None,
    num_micro_batches: int | None,
) -> tuple[RoutedBatch | None, ReLibraError | None]:
    """What this rank has of a batch, or what is wrong with it: the others must hear of that."""
    comm = implementation.groups.experts
    count = None if isinstance(trace, RoutedBatch) else num_micro_batches
    try:
        return routed_batch(trace, micro_batch_of_sequence, count, comm.rank, comm.size), None
    except ReLibraError as error:
        return None, error


def _transport_name(model: nn.Module, first: RelibraEP, cluster: ClusterSpec, options: RuntimeOptions) -> str:
    return chosen_transport(options.transport, first.groups, cluster, _shape_of(moe_layers(model), first))


def _planning(model: nn.Module, implementation: RelibraEP, cluster: ClusterSpec, transport: str) -> Planning:
    layers, groups = moe_layers(model), implementation.groups
    return Planning(
        lambda trace: check_trace_of_model(trace, layers),
        groups,
        cluster,
        "",
        lambda: groups.experts.device,
        lambda: _shape_of(layers, implementation),
        transport,
    )


def _shape_of(layers: list[MoeLayer], implementation: RelibraEP) -> ModelShape:
    down: Any = implementation.experts.down_proj  # of a sharded parameter, the whole shape
    hidden_size, intermediate_size = down.shape[-2:][::-1] if implementation.form.is_transposed else down.shape[-2:]
    sizes = hidden_size, intermediate_size, implementation.num_experts, layers[0].top_k
    return shape_of_sizes(*sizes, layers=len(layers), has_gate=implementation.form.has_gate)


def _weights_of(implementation: RelibraEP) -> ExpertWeights:
    assert implementation.weights is not None  # the layer runs
    return implementation.weights


def _check_plan(plan: BatchPlan, implementations: list[RelibraEP]) -> None:
    comm = implementations[0].groups.experts
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
