"""plan_batch: from a load table to a complete plan."""

import numpy as np

from .cluster import ClusterSpec
from .errors import ShapeError
from .loads import total_loads
from .placement import place
from .plan import BatchPlan, contiguous_home, rank_loads
from .plan_rules import check_home
from .replication import Groups, Moves, replicate


def plan_batch(
    loads: np.ndarray, cluster: ClusterSpec, *, previous_home: np.ndarray | None = None, model: str = ""
) -> BatchPlan:
    """Plan one batch. Deterministic: the same loads give the same plan, bit for bit, on every machine.

    loads:         integer [L, M, E], or [L, M, R, E] by source rank
    previous_home: [L, E], the placement that the batch before left the experts in
    model:         a name that the plan carries, so that it is not used for another model
    """
    table = total_loads(loads)
    layers, _, experts = table.shape
    cluster.experts_per_rank(experts)
    if previous_home is not None:
        check_previous_home(previous_home, layers, experts, cluster.num_ranks)
    home = place(table, cluster.num_nodes, cluster.gpus_per_node)
    replicas, quota = _replicas(table, home, cluster)
    _keep_static_where_better(table, home, replicas, quota, cluster)
    return BatchPlan(
        home=home,
        replicas=replicas,
        quota=quota,
        guests=np.zeros((layers, cluster.num_ranks, cluster.replica_slots), np.bool_),
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


def _keep_static_where_better(
    table: np.ndarray, home: np.ndarray, replicas: np.ndarray, quota: np.ndarray, cluster: ClusterSpec
) -> None:
    """Layers in which the greedy placement came out worse than contiguous homes get these, and their own replicas."""
    mean = np.maximum(table.sum(2), 1)
    static = contiguous_home(table.shape[0], table.shape[2], cluster.num_ranks)
    ours = rank_loads(table, home, replicas, quota).max(2)
    theirs = rank_loads(table, static, replicas[..., :0], quota[..., :0]).max(2)
    worse = np.flatnonzero((ours.sum(1) > theirs.sum(1)) | ((ours / mean).sum(1) > (theirs / mean).sum(1)))
    if len(worse):
        home[worse] = static[worse]
        replicas[worse], quota[worse] = _replicas(table[worse], static[worse], cluster)


def _replicas(table_LME: np.ndarray, home_LE: np.ndarray, cluster: ClusterSpec) -> tuple[np.ndarray, np.ndarray]:
    """int32 [L, M, R, S] twice: the expert in each slot, and its quota."""
    layers, micro_batches, experts = table_LME.shape
    ranks, gpus, nodes = cluster.num_ranks, cluster.gpus_per_node, cluster.num_nodes
    held = np.argsort(home_LE, axis=1, kind="stable").reshape(layers, nodes, gpus, -1)  # home experts by rank
    rest = np.take_along_axis(table_LME, held.reshape(layers, 1, experts), 2)
    # groups X = (layer, micro-batch, node), last
    rest_CGX = np.ascontiguousarray(
        rest.reshape(layers * micro_batches * nodes, gpus, experts // ranks).transpose(2, 1, 0)
    )
    load_GX = rest_CGX.sum(0)
    groups = Groups(load_GX, rest_CGX, np.full_like(load_GX, cluster.replica_slots))
    mean = -(-table_LME.sum(2) // ranks).reshape(-1)  # rounded up
    micro_batch = np.repeat(np.arange(layers * micro_batches), nodes)
    moves = replicate(groups, mean[micro_batch], micro_batch)
    return _slots(moves, held, (layers, micro_batches, nodes, gpus, cluster.replica_slots))


def _slots(moves: Moves, held_LNGC: np.ndarray, shape: tuple[int, int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    layers, micro_batches, nodes, gpus, slots = shape
    order = np.lexsort((moves.host, moves.group))
    moves = moves.where(order)
    spot = moves.group * gpus + moves.host
    first = np.flatnonzero(np.diff(spot, prepend=-1))
    slot = np.arange(len(spot)) - np.repeat(first, np.diff([*first, len(spot)]))
    layer, node = moves.group // (micro_batches * nodes), moves.group % nodes
    replicas = np.full((layers * micro_batches * nodes, gpus, slots), -1, np.int32)
    quota = np.zeros_like(replicas)
    replicas[moves.group, moves.host, slot] = held_LNGC[layer, node, moves.donor, moves.index]
    quota[moves.group, moves.host, slot] = moves.amount
    full = (layers, micro_batches, nodes * gpus, slots)
    return replicas.reshape(full), quota.reshape(full)
