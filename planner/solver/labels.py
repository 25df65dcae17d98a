"""Names of nodes and ranks. A plan is as balanced under any names, so they are given by what else they decide."""

import numpy as np

from ..cluster import ClusterSpec
from ..errors import ShapeError
from .matching import match_labels
from .replicas import Replicas


def wanted_by_nodes(loads: np.ndarray, cluster: ClusterSpec) -> np.ndarray | None:
    """int64 [L, N, E]: the assignments of each node's own tokens, where the table says whose they are."""
    if loads.ndim == 3 or cluster.num_nodes == 1:
        return None
    if loads.shape[2] != cluster.num_ranks:
        raise ShapeError(f"loads has {loads.shape[2]} source ranks, but the cluster has {cluster.num_ranks} ranks")
    layers, micro_batches, _, experts = loads.shape
    by_node = loads.reshape(layers, micro_batches, cluster.num_nodes, -1, experts)
    return by_node.sum((1, 3), dtype=np.int64)


def bring_near(wanted_LNE: np.ndarray, home: np.ndarray, found: Replicas, cluster: ClusterSpec) -> None:
    """Exchange nodes, layer by layer, so that the fewest assignments leave the node of their token."""
    layers, nodes, _ = wanted_LNE.shape
    hosted = (home[:, None] // cluster.gpus_per_node == np.arange(nodes)[:, None]).astype(np.int64)  # [L, N, E]
    label = match_labels(np.matmul(hosted, wanted_LNE.swapaxes(1, 2)))
    ranks = label[:, :, None] * cluster.gpus_per_node + np.arange(cluster.gpus_per_node)
    for layer in range(layers):
        _rename(home, found, layer, ranks[layer].reshape(-1))


def spread_guests(home: np.ndarray, found: Replicas, cluster: ClusterSpec) -> None:
    """Exchange ranks of a node, layer by layer, so that over all layers they hold about the same number of guests."""
    nodes, gpus = cluster.num_nodes, cluster.gpus_per_node
    base = np.arange(nodes)[:, None] * gpus
    held = np.zeros((nodes, gpus), np.int64)
    for layer, count in enumerate(found.guests.sum(2).reshape(-1, nodes, gpus)):
        emptiest = np.argsort(held, axis=1, kind="stable")
        fullest = np.argsort(-count, axis=1, kind="stable")
        new = np.empty((nodes, gpus), np.int64)
        np.put_along_axis(new, fullest, base + emptiest, 1)  # rank -> its new name
        _rename(home, found, layer, new.reshape(-1))
        np.put_along_axis(
            held, emptiest, np.take_along_axis(held, emptiest, 1) + np.take_along_axis(count, fullest, 1), 1
        )


def _rename(home: np.ndarray, found: Replicas, layer: int, new: np.ndarray) -> None:
    """Rank r of a layer becomes rank new[r]."""
    old = np.argsort(new)
    home[layer] = new[home[layer]]
    for array in (found.replicas, found.quota):
        array[layer] = array[layer][:, old]
    for array in (found.guests, found.gain):
        array[layer] = array[layer][old]
