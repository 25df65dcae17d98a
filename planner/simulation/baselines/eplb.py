"""EPLB (DeepSeek): copies of the hottest experts for the whole batch.

Copies are given out one by one to the expert with the highest load per copy, then packed into ranks with equal counts,
heaviest first to the least loaded rank. Hierarchical: experts are packed into nodes first, and copied only inside them.
As published, two copies of an expert may land on one rank, and every copy computes an equal share of the expert's
load. With `split`, shares are the best ones of each micro-batch instead, which its authors do not have.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...errors import InputError
from ...pricing.outcome import Outcome
from .copies import outcome_of_instances


def eplb_global(table_LME: np.ndarray, cluster: ClusterSpec, split: bool = False) -> Outcome:
    expert = place_copies(table_LME.sum(1), cluster.num_ranks, cluster.replica_slots)
    return outcome_of_instances(table_LME, expert, cluster, best_split=split, extra_slots=cluster.replica_slots)


def eplb_hierarchical(table_LME: np.ndarray, cluster: ClusterSpec, split: bool = False) -> Outcome:
    layers = len(table_LME)
    total, nodes = table_LME.sum(1), cluster.num_nodes
    members = pack(total, nodes).reshape(layers * nodes, -1)  # experts of every node
    inner = np.take_along_axis(np.repeat(total, nodes, 0), members, 1)
    expert = place_copies(inner, cluster.gpus_per_node, cluster.replica_slots)
    expert = np.take_along_axis(members, expert.reshape(len(members), -1), 1)
    expert = expert.reshape(layers, cluster.num_ranks, -1)
    return outcome_of_instances(table_LME, expert, cluster, best_split=split, extra_slots=cluster.replica_slots)


def pack(weight_BI: np.ndarray, bins: int) -> np.ndarray:
    """int64 [B, bins, items/bins]: heaviest first, to the lightest bin with room."""
    problems, items = weight_BI.shape
    if items % bins:
        raise InputError(f"{items} experts and copies do not divide over {bins} ranks or nodes, as this policy needs")
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


def place_copies(weight_BE: np.ndarray, bins: int, slots: int) -> np.ndarray:
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
