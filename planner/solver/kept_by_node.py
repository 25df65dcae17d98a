"""Kept replicas where there are few: those that let nodes pass work on to each other.

Fetched replicas even out the ranks of a node, but not the nodes. With few kept replicas a layer, what matters is that
nodes can be level: the copies are chosen and given to nodes as `kept.py` does with ranks, each node taken for one rank,
and exchanged for others where nodes stay uneven. Inside its node, a copy goes where its load overlaps least.
"""

import numpy as np

from ..cluster import ClusterSpec
from .home_swaps import swap_homes
from .kept import Copies, NodeRule, choose_copies, pack, shares
from .kept_swaps import swap_kept
from .solution import Solution, target_load

_TRIES, _SWEEPS = 24, 8  # swaps of a layer, and sweeps of the exact split after each
_TURNS = 2  # of swapping homes, then kept replicas again
_SLACK = 1 / 1024  # above the mean, that a node may be


def choose_by_node(
    table_LME: np.ndarray, home_LE: np.ndarray, total: int, cluster: ClusterSpec, rank_copies: int, most_swaps: int = 0
) -> tuple[np.ndarray, Copies]:
    """Homes [L, E], and ranks for at most `total` copies, one a replica slot, and `rank_copies` a rank over all layers.

    most_swaps: of homes of a layer; each moves two experts.
    """
    layers, micro_batches, _ = table_LME.shape
    nodes, gpus = cluster.num_nodes, cluster.gpus_per_node
    places = cluster.replica_slots * gpus
    share = shares(table_LME, nodes)
    layer, expert = choose_copies(share, total, places * nodes, nodes)
    node_home = home_LE // gpus
    whole = ClusterSpec(nodes, 1, places)
    copies = pack(share, node_home, layer, expert, whole, rank_copies * gpus, NodeRule())
    if not len(copies.layer):
        return home_LE, copies
    place = copies.places(nodes)
    replicas = np.full((layers, micro_batches, nodes, int(place.max()) + 1), -1, np.int32)
    replicas[copies.layer, :, copies.rank, place] = copies.expert[:, None]
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
    return home, pack(share, home, layer, expert, cluster, rank_copies, NodeRule(node=node))
