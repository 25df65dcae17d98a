"""What a policy does with a batch, as the counts that `cost.py` prices. Plans and baselines are compared by them."""

from dataclasses import dataclass

import numpy as np

from ..errors import ShapeError
from ..loads import check_loads, total_loads
from ..plan import BatchPlan, held_experts

_BY_BATCH = ("kept_in", "kept_out", "kept_near_in", "kept_near_out", "moved_in", "moved_out")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy does with one batch: counts over L layers, M micro-batches, R ranks with P slots each.

    slot_load:  int [L, M, R, P]  assignments computed in each of a rank's slots (home, then replica)
    local:      float [L, M, R]   assignments of a rank whose token is on its node; None: load / number of nodes
    pushed_in, pushed_out:  int [L, M, R]  fetched replicas that a rank gets or gives, in its node
    far_in, far_out:        int [L, M, R]  the same between nodes, which only baselines do
    kept_in, kept_out:      int [L, R]     kept replicas that cross between nodes, to a relay
    kept_near_in, kept_near_out: int [L, R]  kept replicas sent inside a node
    kept_copies:            int [R]        kept replicas that a rank has memory for, over all layers; and slots beyond
                            the cluster's, where a baseline fetches without a limit
    moved_in, moved_out:    int [L, R]     experts that changed their home before the batch, with optimizer state
    """

    slot_load: np.ndarray
    local: np.ndarray | None
    pushed_in: np.ndarray
    pushed_out: np.ndarray
    far_in: np.ndarray
    far_out: np.ndarray
    kept_in: np.ndarray
    kept_out: np.ndarray
    kept_near_in: np.ndarray
    kept_near_out: np.ndarray
    moved_in: np.ndarray
    moved_out: np.ndarray
    kept_copies: np.ndarray

    @property
    def rank_load(self) -> np.ndarray:
        """int [L, M, R]."""
        return self.slot_load.sum(3)

    @property
    def local_share(self) -> float:
        """Part of the assignments that are computed on their token's node."""
        load = self.slot_load.sum()
        return float("nan") if self.local is None or not load else float(self.local.sum() / load)

    def imbalance(self) -> np.ndarray:
        """float [L, M], nan without load."""
        load = self.rank_load
        mean = load.mean(2)
        return np.divide(load.max(2), mean, out=np.full(mean.shape, np.nan), where=mean > 0)

    @staticmethod
    def of(slot_load: np.ndarray, local: np.ndarray | None = None, **counts: np.ndarray) -> "Outcome":
        """An outcome in which everything that is not named is zero."""
        layers, micro_batches, ranks, _ = slot_load.shape
        by_name = dict.fromkeys(_BY_BATCH, (layers, ranks)) | {"kept_copies": (ranks,)}
        zeros = {
            name: np.zeros(by_name.get(name, (layers, micro_batches, ranks)), np.int64)
            for name in Outcome.__dataclass_fields__
            if name not in ("slot_load", "local")
        }
        return Outcome(slot_load, local, **{**zeros, **counts})


def wanted_by_nodes(loads: np.ndarray, nodes: int) -> np.ndarray:
    """[L, M, N or 1, E]: assignments of each node's own tokens; an equal share where the table does not say."""
    loads = check_loads(loads)
    if loads.ndim == 3:
        return (loads / nodes)[:, :, None]
    layers, micro_batches, ranks, experts = loads.shape
    if ranks % nodes:
        raise ShapeError(f"loads has {ranks} source ranks, which do not divide over {nodes} nodes")
    return loads.reshape(layers, micro_batches, nodes, -1, experts).sum(3, dtype=np.int64)


def local_assignments(
    expert_LMRP: np.ndarray, slot_load: np.ndarray, wanted: np.ndarray, gpus_per_node: int
) -> np.ndarray:
    """float [L, M, R]: assignments that each rank computes for tokens of its own node, which come first.

    expert_LMRP: the expert in every slot, -1 in empty ones. wanted: from `wanted_by_nodes`.
    """
    layers, micro_batches, ranks, places = slot_load.shape
    nodes, experts = ranks // gpus_per_node, wanted.shape[3]
    used = np.flatnonzero(slot_load.reshape(-1) > 0)
    pair, rank = used // (ranks * places), used // places % ranks
    expert, load = expert_LMRP.reshape(-1)[used], slot_load.reshape(-1)[used].astype(np.float64)
    group = (pair * nodes + rank // gpus_per_node) * experts + expert
    own = wanted.reshape(len(wanted) * micro_batches, -1, experts)
    most = own[pair, rank // gpus_per_node if own.shape[1] > 1 else 0, expert]
    there = np.bincount(group, weights=load, minlength=layers * micro_batches * nodes * experts)[group]
    near = load * np.minimum(most / there, 1.0)
    out = np.bincount(pair * ranks + rank, weights=near, minlength=layers * micro_batches * ranks)
    return out.reshape(layers, micro_batches, ranks)


def count_at(shape: tuple[int, ...], *index: np.ndarray) -> np.ndarray:
    """int64 of this shape: how often each place is named."""
    flat = np.ravel_multi_index(index, shape) if len(index[0]) else np.zeros(0, np.int64)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)


def moves(home_LE: np.ndarray, previous_LE: np.ndarray, ranks: int) -> dict[str, np.ndarray]:
    """`moved_in` and `moved_out` from a previous placement."""
    layer, expert = np.nonzero(home_LE != previous_LE)
    shape = len(home_LE), ranks
    return {
        "moved_in": count_at(shape, layer, home_LE[layer, expert]),
        "moved_out": count_at(shape, layer, previous_LE[layer, expert]),
    }


def outcome_of_plan(plan: BatchPlan, loads: np.ndarray, previous_home: np.ndarray | None = None) -> Outcome:
    """The counts of a plan for these loads [L, M, E] or [L, M, R, E]. Without `previous_home` [L, E] nothing moves."""
    table = total_loads(loads)
    layers, micro_batches, ranks, _ = plan.replicas.shape
    held = held_experts(plan.home, ranks)
    left = table.copy()
    layer, micro_batch, rank, slot = np.nonzero(plan.replicas >= 0)
    expert = plan.replicas[layer, micro_batch, rank, slot]
    np.subtract.at(left, (layer, micro_batch, expert), plan.quota[layer, micro_batch, rank, slot].astype(np.int64))
    at_home = np.take_along_axis(left, np.maximum(held, 0).reshape(layers, 1, -1), 2)
    at_home = np.where(held[:, None] >= 0, at_home.reshape(layers, micro_batches, *held.shape[1:]), 0)
    slot_load = np.concatenate([at_home, plan.quota.astype(np.int64)], 3)
    homes = np.broadcast_to(held[:, None], at_home.shape)
    wanted = wanted_by_nodes(loads, ranks // plan.gpus_per_node)
    local = local_assignments(np.concatenate([homes, plan.replicas], 3), slot_load, wanted, plan.gpus_per_node)

    near = ~plan.kept[layer, rank, slot]
    sender = plan.sources()[layer[near], micro_batch[near], rank[near], slot[near]]
    by_batch = layers, micro_batches, ranks
    counts = {
        "pushed_in": count_at(by_batch, layer[near], micro_batch[near], rank[near]),
        "pushed_out": count_at(by_batch, layer[near], micro_batch[near], sender),
        "kept_copies": plan.kept.sum((0, 2)),
        **kept_transfers(plan.kept_sources(), plan.gpus_per_node),
    }
    if previous_home is not None:
        counts |= moves(plan.home, previous_home, ranks)
    return Outcome.of(slot_load, local, **counts)


def kept_transfers(sources_LRS: np.ndarray, gpus_per_node: int) -> dict[str, np.ndarray]:
    """Counts of kept replicas sent between and inside nodes, from `BatchPlan.kept_sources()`."""
    layer, rank, slot = np.nonzero(sources_LRS >= 0)
    sender = sources_LRS[layer, rank, slot]
    far = sender // gpus_per_node != rank // gpus_per_node
    shape = sources_LRS.shape[:2]
    return {
        "kept_in": count_at(shape, layer[far], rank[far]),
        "kept_out": count_at(shape, layer[far], sender[far]),
        "kept_near_in": count_at(shape, layer[~far], rank[~far]),
        "kept_near_out": count_at(shape, layer[~far], sender[~far]),
    }
