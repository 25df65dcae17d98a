"""Quotas for hosts that a plan already has, where loads turned out otherwise than planned."""

import numpy as np

from ..plan import BatchPlan, held_experts
from .exact import starts
from .fetched import Slots
from .fetched_by_flow import level_slots

_EXACT = 1 << 20


def split_over(plan: BatchPlan, table_LME: np.ndarray, wanted_LMNE: np.ndarray) -> np.ndarray:
    """int32 [L, M, R, S]: the quotas that make the busiest rank of every micro-batch do least.

    It starts from a local-first split: nodes that host an expert take what their own tokens want of it, and share what
    the tokens of other nodes want; hosts of one node take the same.
    """
    layers, micro_batches, ranks, slots = plan.replicas.shape
    pairs, experts, gpus = layers * micro_batches, plan.num_experts, plan.gpus_per_node
    held = held_experts(plan.home, ranks)
    homes = np.broadcast_to(held[:, None], (layers, micro_batches, *held.shape[1:]))
    expert = np.concatenate([homes, plan.replicas], 3).reshape(pairs, ranks, -1).astype(np.int64)
    at = np.flatnonzero(expert >= 0)
    places, nodes = expert.shape[2], ranks // gpus
    key = at // (ranks * places) * experts + expert.reshape(-1)[at]
    group = key * nodes + at // places % ranks // gpus
    beside = np.bincount(group, minlength=pairs * experts * nodes)
    hosting = (beside.reshape(-1, nodes) > 0).sum(1)
    load = table_LME.reshape(-1)
    own = np.broadcast_to(wanted_LMNE, (layers, micro_batches, nodes, experts)).swapaxes(2, 3).reshape(-1, nodes)
    own = np.where(beside.reshape(-1, nodes) > 0, own, 0)
    rest = (load - own.sum(1)) / np.maximum(hosting, 1)
    share = ((own + rest[:, None]).reshape(-1) / np.maximum(beside, 1))[group]
    slot_load = np.zeros(expert.shape, np.int64)
    np.put(slot_load, at, _whole(share, key, load))
    state = Slots(expert, slot_load, np.zeros((pairs, ranks), np.int64), np.zeros(expert.shape, np.bool_))
    target = -(-table_LME.sum(2).reshape(-1) // ranks)
    level_slots(state, target, experts, _EXACT)
    quota = state.load[:, :, held.shape[2] :].astype(np.int32)
    return quota.reshape(layers, micro_batches, ranks, slots)


def _whole(share: np.ndarray, key: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Shares in whole assignments: down, and what is missing to the expert's first hosts, one each."""
    down = np.floor(share + 1e-9).astype(np.int64)
    missing = load - np.bincount(key, weights=down, minlength=len(load)).astype(np.int64)
    order = np.argsort(key, kind="stable")
    turn = np.empty(len(key), np.int64)
    first = starts(key[order])
    turn[order] = np.arange(len(key)) - np.repeat(first, np.diff(first, append=len(key)))
    return down + (turn < missing[key])
