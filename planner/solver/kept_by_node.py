"""Kept replicas where there are few: those that let nodes pass work on to each other.

Fetched replicas even out the ranks of a node, but not the nodes. With few kept replicas a layer, what matters is that
nodes can be level: the replicas are chosen and given to nodes as `kept.py` does with ranks, each node taken for one
rank, and exchanged for others where nodes stay uneven. Then homes may be swapped between nodes. Inside its node, a
replica goes where its load overlaps least.
"""

import numpy as np

from ..cluster import ClusterSpec
from .home_swaps import swap_homes
from .kept import KeptReplicas, NodeRule, choose_replicas, pack, shares
from .kept_swaps import swap_kept
from .solution import Solution, target_load

_TRIES, _SWEEPS = 24, 8  # swaps of a layer, and sweeps of the exact split after each
_TURNS = 2  # of swapping homes, then kept replicas again
_SLACK = 1 / 1024  # above the mean, that a node may be


def choose_by_node(
    table_LME: np.ndarray,
    home_LE: np.ndarray,
    total: int,
    cluster: ClusterSpec,
    rank_replicas: int,
    most_swaps: int = 0,
) -> tuple[np.ndarray, KeptReplicas]:
    """Homes [L, E], and ranks for at most `total` replicas: one a replica slot, and `rank_replicas` a rank over all
    layers.

    most_swaps: of homes of a layer; each moves two experts.
    """
    layers, micro_batches, _ = table_LME.shape
    nodes, gpus = cluster.num_nodes, cluster.gpus_per_node
    places = cluster.replica_slots * gpus
    share = shares(table_LME, nodes)
    layer, expert = choose_replicas(share, total, places * nodes, nodes)
    node_home = home_LE // gpus
    whole = ClusterSpec(nodes, 1, places)
    kept_replicas = pack(share, node_home, layer, expert, whole, rank_replicas * gpus, NodeRule())
    if not len(kept_replicas.layer):
        return home_LE, kept_replicas
    place = kept_replicas.places(nodes)
    replicas = np.full((layers, micro_batches, nodes, int(place.max()) + 1), -1, np.int32)
    replicas[kept_replicas.layer, :, kept_replicas.rank, place] = kept_replicas.expert[:, None]
    kept = replicas[:, 0] >= 0
    solution = Solution(node_home, replicas, np.zeros_like(replicas), kept)
    target = target_load(table_LME, nodes, None, _SLACK)
    home = home_LE.copy()
    swap_kept(table_LME, solution, target, _TRIES, _SWEEPS)
    for most in np.diff(np.arange(_TURNS + 1) * most_swaps // _TURNS):
        swap_homes(table_LME, solution, home, target, int(most), _SWEEPS)
        swap_kept(table_LME, solution, target, _TRIES, _SWEEPS)
    layer, node, slot = np.nonzero(solution.kept)
    expert = solution.replicas[layer, 0, node, slot].astype(np.int64)
    share = shares(table_LME, cluster.num_ranks)
    return home, pack(share, home, layer, expert, cluster, rank_replicas, NodeRule(node=node))
