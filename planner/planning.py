"""plan_batch: from a load table to a complete plan."""

import numpy as np

from .cluster import ClusterSpec
from .errors import ShapeError
from .loads import total_loads
from .options import PlanOptions
from .plan import BatchPlan, contiguous_home, rank_loads
from .plan_rules import check_home
from .solver.effort import SearchOptions
from .solver.labels import wanted_by_nodes
from .solver.replicas import Replicas
from .solver.search import plan_layers

_DISPERSION = 1.5  # variance over mean of the experts' loads up to which a micro-batch is uniform; random draws have 1


def plan_batch(
    loads: np.ndarray,
    cluster: ClusterSpec,
    *,
    previous_home: np.ndarray | None = None,
    model: str = "",
    options: PlanOptions | None = None,
) -> BatchPlan:
    """Plan one batch. Deterministic: the same loads give the same plan, bit for bit, on every machine.

    loads:         integer [L, M, E], or [L, M, R, E] by source rank: then nodes get experts that their own tokens use,
                   as far as that costs no balance and, with a previous placement, no move
    previous_home: [L, E], the placement that the batch before left the experts in
    model:         a name that the plan carries, so that it is not used for another model
    """
    options = options or PlanOptions()
    search = SearchOptions(
        balance=options.balance or 1.0,
        effort=options.effort,
        max_moves=options.max_moves,
        max_kept=options.kept_copies,
        kept_slots=None if options.fetched_slots is None else max(cluster.replica_slots - options.fetched_slots, 0),
    )
    return search_plan(loads, cluster, search, previous_home=previous_home, model=model)


def search_plan(
    loads: np.ndarray,
    cluster: ClusterSpec,
    options: SearchOptions,
    *,
    previous_home: np.ndarray | None = None,
    model: str = "",
) -> BatchPlan:
    """`plan_batch` with the options of the search itself."""
    table = total_loads(loads)
    layers, micro_batches, experts = table.shape
    cluster.home_slots(experts)
    if previous_home is None:
        home = contiguous_home(layers, experts, cluster.num_ranks)
    else:
        check_previous_home(previous_home, layers, experts, cluster.num_ranks)
        home = previous_home.astype(np.int32)
    found = Replicas.none(layers, micro_batches, cluster.num_ranks, cluster.replica_slots)
    as_is = rank_loads(table, home, found.replicas, found.quota).max(2)
    uneven = experts % cluster.num_ranks > 0  # the search knows equal counts alone
    skewed = np.flatnonzero(~_even_enough(table, as_is, cluster.num_ranks, options.balance) & ~np.bool_(uneven))
    if len(skewed):
        fixed = None if previous_home is None else home[skewed]
        wanted = wanted_by_nodes(np.asarray(loads), cluster)
        home[skewed], better = plan_layers(
            table[skewed], cluster, fixed, options, None if wanted is None else wanted[skewed]
        )
        found.put(skewed, better, np.arange(len(skewed)))
    return BatchPlan(
        home=home,
        replicas=found.replicas,
        quota=found.quota,
        kept=found.guests,
        gpus_per_node=cluster.gpus_per_node,
        model=model,
        loads=table,
    )


def check_previous_home(previous_home: np.ndarray, layers: int, experts: int, ranks: int) -> None:
    """A previous placement must fit this batch and be a placement."""
    if previous_home.shape != (layers, experts) or previous_home.dtype.kind not in "iu":
        raise ShapeError(
            f"previous_home is {previous_home.dtype} of shape {previous_home.shape}, but must be integer "
            f"[layers, experts] = {(layers, experts)}"
        )
    check_home(previous_home, ranks)


def _even_enough(table: np.ndarray, busiest_LM: np.ndarray, ranks: int, balance: float) -> np.ndarray:
    """bool [L]: layers that need no plan, since every micro-batch is good enough as it is, or since their routing is
    uniform: the experts' loads vary no more than if every assignment had been drawn at random."""
    good = (busiest_LM * ranks <= np.maximum(table.sum(2) * balance, ranks)).all(1)
    drawn = (_dispersion(table).mean(1) <= _DISPERSION) & (_dispersion(table.sum(1)) <= _batch_bound(table.shape[2]))
    return good | drawn


def _dispersion(loads: np.ndarray) -> np.ndarray:
    """Variance over mean along the experts: 1 for random draws."""
    mean = np.maximum(loads.mean(-1, keepdims=True), 1e-9)
    return ((loads - mean) ** 2 / mean).sum(-1) / max(loads.shape[-1] - 1, 1)


def _batch_bound(experts: int) -> float:
    """What random draws of a whole batch stay below: four standard deviations. An expert that is hot in every
    micro-batch shows there, however small the micro-batches are."""
    return 1 + 4 * (2 / max(experts - 1, 1)) ** 0.5
