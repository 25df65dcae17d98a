"""LPLB (DeepSeek): copies along the edges of a fixed graph, and for every micro-batch the best split over them.

Experts are packed into ranks as EPLB does. Slot s of a rank holds the s-th hottest expert of its neighbour in the graph
of the node (the hottest again where a rank has fewer): a cube (rank XOR 2 ** s) where ranks are a power of two and
slots few enough, else a ring. The split is the linear program that makes the busiest rank least busy. Here one edge is
levelled after the other, 30 times, which tends to the same optimum: the most even split is the one with the least
squares, and that problem is convex.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.outcome import Outcome
from .eplb import pack

_SWEEPS = 30


def lplb(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers, micro_batches, _ = table_LME.shape
    ranks, gpus, slots = cluster.num_ranks, cluster.gpus_per_node, cluster.replica_slots
    total = table_LME.sum(1)
    nodes = pack(total, cluster.num_nodes).reshape(layers * cluster.num_nodes, -1)
    inner = pack(np.take_along_axis(np.repeat(total, cluster.num_nodes, 0), nodes, 1), gpus)
    expert = np.take_along_axis(nodes, inner.reshape(len(nodes), -1), 1).reshape(layers, ranks, -1)  # hottest first
    at_home = np.take_along_axis(table_LME, expert.reshape(layers, 1, -1), 2).astype(np.float64)
    at_home = at_home.reshape(layers, micro_batches, ranks, -1)
    slots = min(slots, gpus - 1)
    on_edge = np.zeros((layers, micro_batches, ranks, slots))
    load = at_home.sum(3)
    cube = gpus & (gpus - 1) == 0 and 1 << slots <= gpus
    edges = []
    for rank in range(ranks):
        base, local = rank // gpus * gpus, rank % gpus
        for slot in range(slots):
            neighbour = local ^ (1 << slot) if cube else (local + slot + 1) % gpus
            edges.append((base + neighbour, rank, slot, slot % expert.shape[2]))
    for _ in range(_SWEEPS):
        for host, owner, slot, index in edges:
            shift = np.clip(
                (load[..., owner] - load[..., host]) / 2, -on_edge[..., host, slot], at_home[..., owner, index]
            )
            on_edge[..., host, slot] += shift
            at_home[..., owner, index] -= shift
            load[..., owner] -= shift
            load[..., host] += shift
    whole = np.floor(on_edge).astype(np.int64)
    for host, owner, slot, index in edges:
        at_home[..., owner, index] += on_edge[..., host, slot] - whole[..., host, slot]
    return Outcome.of(np.concatenate([np.rint(at_home).astype(np.int64), whole], 3))
