"""From a trainer's batch to a plan: what is common to verl, slime and others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parallel.routed_batch import RoutedBatch
from ..planner import BatchPlan, ClusterSpec, PlanOptions, RoutingTrace, plan_batch
from ..planner.errors import InputError


@dataclass(frozen=True)
class PlannedBatch:
    """A plan, and the routed batch of the whole group that it is for: every rank gives both to `ExpertParallel.batch`.

    loads: int32 [L, M, R, E], the batch's table by source rank
    """

    plan: BatchPlan
    batch: RoutedBatch
    loads: np.ndarray


def plan_routed_batch(
    batch: RoutedBatch,
    cluster: ClusterSpec,
    *,
    previous_home: np.ndarray | None = None,
    model: str = "",
    options: PlanOptions | None = None,
) -> PlannedBatch:
    """Plan a batch that one process knows whole. The same everywhere: call it on every rank, or on one.

    Args:
        previous_home: int [L, E], `plan.home` of the batch before.
        options: what the plan is to achieve, and at what price.

    Raises: InputError where the batch is for another number of ranks than the cluster.
    """
    if batch.num_ranks != cluster.num_ranks:
        raise InputError(f"the routed batch is for {batch.num_ranks} ranks; the cluster has {cluster.num_ranks}")
    loads = batch.loads()
    plan = plan_batch(loads, cluster, previous_home=previous_home, model=model, options=options)
    return PlannedBatch(plan, batch, loads)


def plan_micro_batches(
    trace: RoutingTrace,
    micro_batches: Sequence[Sequence[Sequence[int]]],
    cluster: ClusterSpec,
    *,
    previous_home: np.ndarray | None = None,
    model: str = "",
    options: PlanOptions | None = None,
) -> PlannedBatch:
    """`plan_routed_batch` of `RoutedBatch.from_micro_batches(trace, micro_batches)`."""
    batch = RoutedBatch.from_micro_batches(trace, micro_batches)
    return plan_routed_batch(batch, cluster, previous_home=previous_home, model=model, options=options)
