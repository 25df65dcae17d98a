"""EPLB (DeepSeek): copies of the hottest experts for the whole batch, each computing an equal part.

Copies are given out one by one to the expert with the highest load per copy, then copies are packed into ranks with
equal counts, heaviest first to the least loaded rank. Hierarchical: experts are packed into nodes first, and copied
only inside them. As published, two copies of an expert may land on one rank.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.outcome import Outcome


def eplb_global(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    return _outcome(table_LME, _copies(table_LME.sum(1), cluster.num_ranks, cluster.replica_slots), cluster)


def eplb_hierarchical(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers = len(table_LME)
    total, nodes = table_LME.sum(1), cluster.num_nodes
    members = pack(total, nodes).reshape(layers * nodes, -1)  # experts of every node
    inner = np.take_along_axis(np.repeat(total, nodes, 0), members, 1)
    expert = _copies(inner, cluster.gpus_per_node, cluster.replica_slots)
    expert = np.take_along_axis(members, expert.reshape(len(members), -1), 1)
    return _outcome(table_LME, expert.reshape(layers, cluster.num_ranks, -1), cluster)


def pack(weight_BI: np.ndarray, bins: int) -> np.ndarray:
    """int64 [B, bins, items/bins]: heaviest first, to the lightest bin with room."""
    problems, items = weight_BI.shape
    size = items // bins
    load, filled = np.zeros((problems, bins)), np.zeros((problems, bins), np.int64)
    members = np.empty((problems, bins, size), np.int64)
    rows = np.arange(problems)
    for item in np.argsort(-weight_BI, axis=1, kind="stable").T:
        target = np.where(filled < size, load, np.inf).argmin(1)
        members[rows, target, filled[rows, target]] = item
        load[rows, target] += weight_BI[rows, item]
        filled[rows, target] += 1
    return members


def _copies(weight_BE: np.ndarray, bins: int, slots: int) -> np.ndarray:
    """int64 [B, bins, E/bins + slots]: the expert in every place."""
    problems, experts = weight_BE.shape
    count = np.ones((problems, experts), np.int64)
    expert = np.tile(np.arange(experts), (problems, 1))
    rows = np.arange(problems)
    for _ in range(bins * slots):
        hottest = (weight_BE / count).argmax(1)
        count[rows, hottest] += 1
        expert = np.concatenate([expert, hottest[:, None]], 1)
    places = pack(np.take_along_axis(weight_BE / count, expert, 1), bins)
    return np.take_along_axis(expert, places.reshape(problems, -1), 1).reshape(places.shape)


def _outcome(table_LME: np.ndarray, expert_LRP: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers, micro_batches, experts = table_LME.shape
    flat = expert_LRP.reshape(layers, -1)
    order = np.argsort(flat, axis=1, kind="stable")
    in_order = np.take_along_axis(flat, order, 1)
    nth = np.empty_like(flat)  # which of its expert's copies a place holds
    first = np.apply_along_axis(np.searchsorted, 1, in_order, np.arange(experts))
    np.put_along_axis(nth, order, np.arange(flat.shape[1]) - np.take_along_axis(first, in_order, 1), 1)
    count = np.diff(first, axis=1, append=flat.shape[1])
    copies = np.take_along_axis(count, flat, 1)[:, None]
    load = np.take_along_axis(table_LME, flat[:, None], 2)
    part = load // copies + (nth[:, None] < load % copies)

    # A copy on another node than the first one is fetched once a batch over the slow network, its gradient returned.
    node = np.broadcast_to(np.arange(cluster.num_ranks)[:, None] // cluster.gpus_per_node, expert_LRP.shape[1:])
    node = np.broadcast_to(node.reshape(1, -1), flat.shape)
    home = np.take_along_axis(np.take_along_axis(node, np.take_along_axis(order, first, 1), 1), flat, 1)
    fetched = (node != home).reshape(expert_LRP.shape).sum(2)
    holder = np.take_along_axis(np.take_along_axis(order, first, 1) // expert_LRP.shape[2], flat, 1)
    given = np.zeros_like(fetched)
    np.add.at(given, (np.arange(layers)[:, None], holder), (node != home).astype(np.int64))
    return Outcome.of(part.reshape(layers, micro_batches, *expert_LRP.shape[1:]), kept_in=fetched, kept_out=given)
