"""Kept replicas: which experts get one for the batch, and on which ranks.

How many: an expert's share is its load, in its worst micro-batch, divided by the number of its hosts. Again and again
the expert with the largest share gets one more host. Shares are counted in units of a rank's mean load, so that experts
of all layers compete for the same memory.
Where: largest shares first, each to the rank whose load overlaps least with the expert's. Loads are vectors over
micro-batches: experts that are hot in different micro-batches may share a rank, those that are hot in the same may not.
"""

from dataclasses import dataclass

import numpy as np

from ..cluster import ClusterSpec
from .hosts import best_host

_SCALE = 1 << 14  # of a rank's mean load. Whole numbers below 2^53 throughout, so that sums are exact in any order
_MOST = 1 << 19


@dataclass(frozen=True, eq=False)
class KeptReplicas:
    """C kept replicas, one (layer, expert, rank) each. int64 [C]."""

    layer: np.ndarray
    expert: np.ndarray
    rank: np.ndarray

    @staticmethod
    def none() -> "KeptReplicas":
        return KeptReplicas(*(np.zeros(0, np.int64),) * 3)

    def places(self, ranks: int) -> np.ndarray:
        """int64 [C]: how many of the same layer and rank come before each."""
        key = self.layer * ranks + self.rank
        order = np.argsort(key, kind="stable")
        place = np.empty(len(key), np.int64)
        place[order] = np.arange(len(key)) - np.searchsorted(key[order], key[order])
        return place


def shares(load_LME: np.ndarray, ranks: int) -> np.ndarray:
    """float64 [L, E, M] of whole numbers: loads, in 1/16384 of a rank's mean load in that micro-batch."""
    total = np.maximum(load_LME.sum(2, keepdims=True), 1)
    scaled = np.floor(load_LME.astype(np.float64) * (ranks * _SCALE) / total + 0.5)
    return np.ascontiguousarray(np.minimum(scaled, _MOST).swapaxes(1, 2))


def choose_replicas(
    share_LEM: np.ndarray, total: int, per_layer: int, most_hosts: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [C] twice: layer and expert of the replicas that help most, at most `total`, and `per_layer` of a layer."""
    layers, experts, _ = share_LEM.shape
    hosts = np.ones((layers, experts), np.int64)
    peak = share_LEM.max(2)
    rows = np.arange(layers)
    chosen, worth = [], []
    for _ in range(min(per_layer, total)):
        value = np.where(hosts < most_hosts, peak / hosts, -1.0)
        expert = value.argmax(1)
        chosen.append(expert)
        worth.append(value[rows, expert])
        hosts[rows, expert] += 1
    if not chosen:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    expert, value = np.stack(chosen, 1), np.stack(worth, 1)
    best = np.argsort(-value.reshape(-1), kind="stable")[:total]
    best = np.sort(best[value.reshape(-1)[best] > 0])
    return best // expert.shape[1], expert.reshape(-1)[best]


@dataclass(frozen=True, eq=False)
class NodeRule:
    """Which nodes kept replicas go to, as far as there is room.

    Attributes:
        spread: first to nodes that have least replicas of the expert.
        far: a home sends its experts of a layer to another node so many times; further replicas go where one is.
            None is without a limit.
        node: int64 [C], the node that each replica goes to. None: any.
    """

    spread: bool = False
    far: int | None = None
    node: np.ndarray | None = None


def pack(
    share_LEM: np.ndarray,
    home_LE: np.ndarray,
    layer: np.ndarray,
    expert: np.ndarray,
    cluster: ClusterSpec,
    rank_replicas: int,
    rule: NodeRule,
) -> KeptReplicas:
    """Ranks for replicas (layer, expert), at most one a replica slot, and `rank_replicas` a rank over all layers."""
    layers, experts, micro_batches = share_LEM.shape
    ranks, gpus_per_node = cluster.num_ranks, cluster.gpus_per_node
    count = np.ones((layers, experts), np.int64)
    np.add.at(count, (layer, expert), 1)
    share = np.floor(share_LEM / count[:, :, None])
    load = np.zeros((layers, ranks, micro_batches))
    np.add.at(load, (np.arange(layers)[:, None], home_LE), share)
    nodes = ranks // gpus_per_node
    holds = np.zeros((layers, experts, ranks), np.bool_)
    holds[np.arange(layers)[:, None], np.arange(experts), home_LE] = True
    on_node = np.zeros((layers, experts, nodes), np.int64)
    on_node[np.arange(layers)[:, None], np.arange(experts), home_LE // gpus_per_node] = 1
    to_send = np.full((layers, ranks), nodes * experts if rule.far is None else rule.far, np.int64)
    free = np.full((layers, ranks), min(cluster.replica_slots, rank_replicas), np.int64)
    left = np.full(ranks, rank_replicas, np.int64)
    weight = (share * share).sum(2)
    order = np.lexsort((expert, -weight[layer, expert], layer))
    layer, expert = layer[order], expert[order]
    elsewhere = np.zeros((len(layer), ranks), np.bool_)
    if rule.node is not None:
        elsewhere = np.arange(ranks) // gpus_per_node != rule.node[order][:, None]
    turn = np.arange(len(layer)) - np.searchsorted(layer, layer)
    rank = np.full(len(layer), -1)
    for now in range(int(turn.max(initial=-1)) + 1):
        waiting = np.flatnonzero(turn == now)
        while len(waiting):
            at, e = layer[waiting], expert[waiting]
            cost = np.matmul(load[at], share[at, e][:, :, None])[:, :, 0]
            if rule.spread:  # a node with fewer replicas of it always comes first
                cost += np.repeat(on_node[at, e], gpus_per_node, axis=1) * 2.0**52
            shut = (on_node[at, e] == 0) & (to_send[at, home_LE[at, e]] <= 0)[:, None]
            cost += np.repeat(shut, gpus_per_node, axis=1) * 2.0**60
            cost[(free[at] <= 0) | (left <= 0) | holds[at, e] | elsewhere[waiting]] = np.inf
            best = best_host(-cost)
            open_ = cost[np.arange(len(at)), best] < np.inf
            waiting, at, e, best = waiting[open_], at[open_], e[open_], best[open_]
            place = np.zeros(len(best), np.int64)  # of the layers that want the same rank, as many as it has room for
            by_rank = np.argsort(best, kind="stable")
            place[by_rank] = np.arange(len(best)) - np.searchsorted(best[by_rank], best[by_rank])
            seated = place < left[best]
            index, at, e, best = waiting[seated], at[seated], e[seated], best[seated]
            rank[index] = best
            load[at, best] += share[at, e]
            holds[at, e, best] = True
            to_send[at, home_LE[at, e]] -= on_node[at, e, best // gpus_per_node] == 0
            on_node[at, e, best // gpus_per_node] += 1
            free[at, best] -= 1
            np.subtract.at(left, best, 1)
            waiting = waiting[~seated]
    kept = rank >= 0
    return KeptReplicas(layer[kept], expert[kept], rank[kept])
