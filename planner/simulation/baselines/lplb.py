"""LPLB (DeepSeek): copies along the edges of a fixed graph, and for every micro-batch the best split over them.

Experts are packed into ranks as EPLB does. Slot s of a rank holds one of the hottest experts of its neighbour in the
node's graph. For 8 ranks with two slots it is the authors' cube, in which slot 0 of ranks 0-7 copies from ranks
3 0 1 2 7 4 5 6 and slot 1 from 6 7 4 5 0 1 2 3: connected, so that load passes along more than one edge. Other sizes
get a ring.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.outcome import Outcome
from .copies import outcome_of_instances
from .eplb import pack

_CUBE = np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]])


def lplb(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers = len(table_LME)
    ranks, gpus = cluster.num_ranks, cluster.gpus_per_node
    slots = min(cluster.replica_slots, gpus - 1)
    total = table_LME.sum(1)
    nodes = pack(total, cluster.num_nodes).reshape(layers * cluster.num_nodes, -1)
    inner = pack(np.take_along_axis(np.repeat(total, cluster.num_nodes, 0), nodes, 1), gpus)
    held = np.take_along_axis(nodes, inner.reshape(len(nodes), -1), 1).reshape(layers, ranks, -1)  # hottest first
    copies = np.empty((layers, ranks, slots), np.int64)
    local = np.arange(ranks) % gpus
    for slot in range(slots):
        neighbour = _CUBE[slot][local] if gpus == 8 and slots <= 2 else (local + slot + 1) % gpus
        copies[:, :, slot] = held[:, np.arange(ranks) - local + neighbour, slot % held.shape[2]]
    return outcome_of_instances(
        table_LME, np.concatenate([held, copies], 2), cluster, best_split=True, extra_slots=slots
    )
