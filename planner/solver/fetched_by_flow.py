"""Fetched replicas, as few as possible: each lets a set of overloaded ranks pass work on to ranks with room.

Where a (layer, micro-batch) stays above its target, the exact split says why: there are ranks from which no path leads
to a rank with room. A replica opens such a path: a rank outside of the set, with a free slot, fetches from its own node
an expert that the set computes much of. At most one a node is added at a time, and no more than the excess needs. Then
the split is made level again, with the new replicas.
"""

import numpy as np

from .exact import FAR, PairFlow
from .fetched import Slots
from .hosts import best_host

_SWEEPS = 6  # of the exact split while replicas are still added


def flow_of_slots(slots: Slots, experts: int) -> tuple[PairFlow, np.ndarray]:
    """The exact split's view of these slots, and where its hosts are in them, laid flat."""
    pairs, ranks, places = slots.expert.shape
    expert = slots.expert.reshape(-1)
    at = np.flatnonzero((expert >= 0) & (expert < experts))
    key = at // (ranks * places) * experts + expert[at]
    several = np.flatnonzero(np.bincount(key, minlength=pairs * experts)[key] > 1)
    at, key = at[several], key[several]
    order = np.argsort(key, kind="stable")
    at = at[order]
    split, load = slots.load.reshape(-1)[at], slots.load.sum(2).reshape(-1)
    return PairFlow(key[order], at // places, split, load, experts, ranks), at


def level_slots(slots: Slots, target_P: np.ndarray, experts: int, sweeps: int) -> PairFlow:
    """Exact splits, in place, over all that the slots hold; the flow they end with."""
    flow, at = flow_of_slots(slots, experts)
    if len(flow.expert):
        flow.level(target_P, sweeps)
        np.put(slots.load, at, flow.split)
    return flow


def fetch_by_flow(
    slots: Slots, target_P: np.ndarray, experts: int, gpus_per_node: int, rounds: int, sweeps: int
) -> None:
    """Add fetched replicas, in place, until the targets are met or no further replica helps."""
    open_ = np.arange(len(target_P))
    for turn in range(rounds + 1):
        open_ = open_[slots.load[open_].sum(2).max(1) > target_P[open_]]
        if not len(open_):
            return
        part, target = slots.of_pairs(open_), target_P[open_]
        flow = level_slots(part, target, experts, sweeps if turn == rounds else min(sweeps, _SWEEPS))
        helped = np.zeros(len(open_), np.bool_)
        if turn < rounds:
            helped = _add(part, flow, target, gpus_per_node)
            rest = np.flatnonzero(~helped)
            if len(rest) and sweeps > _SWEEPS:  # a few sweeps may not have shown yet what is stuck
                others = part.of_pairs(rest)
                flow = level_slots(others, target[rest], experts, sweeps)
                helped[rest] = _add(others, flow, target[rest], gpus_per_node)
                part.put(rest, others)
        slots.put(open_, part)
        open_ = open_[helped]


def _add(slots: Slots, flow: PairFlow, target_P: np.ndarray, gpus_per_node: int) -> np.ndarray:
    """Add replicas, in place; bool [P], the pairs that got any."""
    at, expert, rank = _replicas_to_add(slots, flow, target_P, gpus_per_node)
    new = (slots.expert[at, rank] < 0).argmax(1)
    slots.expert[at, rank, new], slots.fetched[at, rank, new] = expert, True
    slots.free[at, rank] -= 1
    helped = np.zeros(len(target_P), np.bool_)
    helped[at] = True
    return helped


def _replicas_to_add(
    slots: Slots, flow: PairFlow, target_P: np.ndarray, gpus_per_node: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pair, expert and rank of the replicas to add: one a node and pair at most."""
    pairs, ranks, _ = slots.expert.shape
    experts, nodes = flow.experts, ranks // gpus_per_node
    target = np.repeat(target_P, ranks)
    steps, _ = flow.distances(flow.load < target, np.ones(len(flow.load), np.bool_))
    stuck = (steps >= FAR).reshape(pairs, ranks)
    over = np.maximum(flow.load - target, 0).reshape(pairs, ranks)
    excess = np.where(stuck, over, 0).sum(1)
    pair, rank, place = np.nonzero((slots.expert >= 0) & (slots.expert < experts))
    expert = slots.expert[pair, rank, place]
    load = np.where(stuck[pair, rank], slots.load[pair, rank, place], 0).astype(np.float64)
    inside = np.bincount(pair * experts + expert, weights=load, minlength=pairs * experts).reshape(pairs, 1, experts)
    held = ~slots.fetched[pair, rank, place]
    on_node = np.zeros((pairs, nodes, experts), np.bool_)
    on_node[pair[held], rank[held] // gpus_per_node, expert[held]] = True

    room = np.maximum(target - flow.load, 0).reshape(pairs, ranks)
    room = np.where(stuck | (slots.free <= 0), -1, room).reshape(pairs, nodes, gpus_per_node)
    local = best_host(room)
    open_ = np.take_along_axis(room, local[:, :, None], 2)[:, :, 0] >= 0
    to = local + np.arange(nodes) * gpus_per_node
    score = np.where(on_node & open_[:, :, None], inside, 0.0)
    here = slots.expert[np.arange(pairs)[:, None], to]  # [P, N, Q]: what the rank with room has already
    row, column, place = np.nonzero((here >= 0) & (here < experts))
    score[row, column, here[row, column, place]] = 0.0
    best = score.argmax(2)
    gain = np.take_along_axis(score, best[:, :, None], 2)[:, :, 0]
    # First where a rank can take most itself; as many as would take away the excess if all could be passed on.
    most = np.take_along_axis(room, local[:, :, None], 2)[:, :, 0]
    order = np.argsort(-np.minimum(gain, np.maximum(most, 0)), axis=1, kind="stable")
    ranked = np.take_along_axis(gain, order, 1)
    at, position = np.nonzero((np.cumsum(ranked, 1) - ranked < excess[:, None]) & (ranked > 0))
    node = order[at, position]
    return at, best[at, node], to[at, node]
