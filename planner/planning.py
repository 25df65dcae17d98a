"""plan_batch: from a load table to a complete plan."""

import numpy as np

from .cluster import ClusterSpec
from .errors import InputError, ShapeError
from .loads import check_loads, total_loads
from .options import PlanOptions
from .plan import BatchPlan, contiguous_home, rank_loads
from .plan_rules import check_home
from .pricing.outcome import wanted_by_nodes
from .solver.new_quotas import split_over
from .solver.search import plan_layers
from .solver.solution import Solution
from .solver.to_plan import LayersToPlan

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

    loads:         integer [L, M, E], or [L, M, R, E] by source rank. With sources, experts come to nodes whose own
                   tokens use them, where balance does not suffer and no more experts leave `previous_home`
    previous_home: [L, E], the placement that the batch before left the experts in
    model:         a name that the plan carries, so that it is not used for another model
    """
    if not isinstance(cluster, ClusterSpec):
        raise InputError(
            f"cluster is {cluster!r}, but must be a ClusterSpec: ClusterSpec(num_nodes=1, gpus_per_node=8)"
        )
    if options is not None and not isinstance(options, PlanOptions):
        raise InputError(f"options is {options!r}, but must be PlanOptions(...)")
    options = options or PlanOptions()
    table = total_loads(loads)
    layers, micro_batches, experts = table.shape
    cluster.home_slots(experts)
    if np.ndim(loads) == 4 and np.shape(loads)[2] != cluster.num_ranks:
        raise ShapeError(f"loads has {np.shape(loads)[2]} source ranks, but the cluster has {cluster.num_ranks} ranks")
    if previous_home is None:
        home = contiguous_home(layers, experts, cluster.num_ranks)
    else:
        check_previous_home(previous_home, layers, experts, cluster.num_ranks)
        home = previous_home.astype(np.int32)
    shape = (layers, micro_batches, cluster.num_ranks, cluster.replica_slots)
    found = Solution(
        home, np.full(shape, -1, np.int32), np.zeros(shape, np.int32), np.zeros((shape[0], *shape[2:]), np.bool_)
    )
    as_is = rank_loads(table, home, found.replicas, found.quota).max(2)
    skewed = np.flatnonzero(~_even_enough(table, as_is, cluster.num_ranks, options.balance or 1.0))
    if len(skewed):
        wanted = wanted_by_nodes(loads, cluster.num_nodes)
        setting = options.setting(experts, cluster.gpus_per_node)
        to_plan = LayersToPlan(
            table[skewed], wanted[skewed], home[skewed], options.kept_copies, cluster, options, setting
        )
        better = plan_layers(to_plan)
        for name in ("home", "replicas", "quota", "kept"):
            getattr(found, name)[skewed] = getattr(better, name)
    return BatchPlan(
        home=found.home,
        replicas=found.replicas,
        quota=found.quota,
        kept=found.kept,
        gpus_per_node=cluster.gpus_per_node,
        model=model,
        loads=table,
    )


def replan(plan: BatchPlan, loads: np.ndarray) -> BatchPlan:
    """The same homes and replicas with quotas for other loads: what to do where a batch turns out otherwise than
    planned.

    Quotas are split anew, exactly (`solver/exact.py`), over the hosts that the plan has in each micro-batch.

    loads: [L, M, E] or [L, M, R, E], of the plan's layers and micro-batches; for one micro-batch m,
    `plan.micro_batch(m)`
    """
    table = total_loads(loads)
    plan.check_loads(table)
    quota = split_over(plan, table, wanted_by_nodes(loads, plan.num_ranks // plan.gpus_per_node))
    return BatchPlan(plan.home, plan.replicas, quota, plan.kept, plan.gpus_per_node, model=plan.model, loads=table)


def scaled_loads(known: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """A load table from partly recorded batches: unknown tokens are taken to choose as the known ones beside them do.

    Args:
        known: [L, M, E] or [L, M, R, E], assignments of the recorded tokens.
        tokens: int [M] or [M, R], all assignments a layer has there: recorded or not, top-k each.

    Returns:
        The same shape, each (micro-batch, rank) scaled to its tokens by largest remainder. Where nothing at all is
        known, the layer's other micro-batches stand in.
    """
    known = check_loads(known).astype(np.int64)
    wanted = np.asarray(tokens)
    if wanted.shape != known.shape[1:-1] or wanted.dtype.kind not in "iu":
        raise ShapeError(
            f"tokens is {wanted.dtype} of shape {wanted.shape}, but must be integer of shape {known.shape[1:-1]}"
        )
    if (known.sum(-1) > wanted).any():
        raise InputError("tokens has fewer assignments somewhere than were recorded there")
    like = np.where(known.sum(-1, keepdims=True) > 0, known, known.sum(1, keepdims=True))
    missing = wanted - known.sum(-1)
    total = np.maximum(like.sum(-1), 1)
    whole, rest = np.divmod(missing[..., None] * like, total[..., None])
    left = np.where(like.sum(-1) > 0, missing - whole.sum(-1), 0)
    order = np.argsort(np.argsort(-rest, axis=-1, kind="stable"), axis=-1, kind="stable")
    return (known + whole + (order < left[..., None])).astype(np.int64)


def check_previous_home(previous_home: np.ndarray, layers: int, experts: int, ranks: int) -> None:
    """A previous placement must fit this batch and be a placement."""
    if previous_home.shape != (layers, experts) or previous_home.dtype.kind not in "iu":
        raise ShapeError(
            f"previous_home is {previous_home.dtype} of shape {previous_home.shape}, but must be integer "
            f"[layers, experts] = {(layers, experts)}"
        )
    check_home(previous_home, ranks)


def _even_enough(table: np.ndarray, busiest_LM: np.ndarray, ranks: int, balance: float) -> np.ndarray:
    """bool [L]: layers that need no plan.

    Either every micro-batch is good enough as it is, or routing is uniform: the experts' loads vary no more than if
    every assignment had been drawn at random.
    """
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
