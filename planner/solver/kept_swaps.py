"""Swap kept replicas for others in layers where some micro-batches stay uneven.

The exact split shows where work is stuck: on a set of overloaded ranks that share no expert with ranks that have room.
A new kept replica helps: an expert of which these ranks compute much, on a rank outside of the set. It takes the slot
of the least used kept replica of that rank. The swap stays if the exact split over all micro-batches of the layer is
better with it. Each round tries one swap in every layer.
"""

import numpy as np

from ..plan import held_experts
from .exact import FAR
from .fetched import Slots
from .fetched_by_flow import flow_of_slots, level_slots
from .hosts import best_host
from .solution import Solution


def swap_kept(
    table_LME: np.ndarray, solution: Solution, target_LM: np.ndarray, tries: int = 48, sweeps: int = 200
) -> None:
    """Swap kept replicas, in place, of layers without fetched ones, until the targets are met or no swap helps.

    tries: swaps of a layer at most. sweeps: of each exact split at most.
    """
    layers, _, experts = table_LME.shape
    ranks, slots = solution.kept.shape[1:]
    held = held_experts(solution.home, ranks)
    expert_LRQ = np.concatenate([held, np.where(solution.kept, solution.replicas[:, 0], -1)], 2).astype(np.int64)
    load = _loads(table_LME, solution, held)
    state = _slots(expert_LRQ, load)
    level_slots(state, target_LM.reshape(-1), experts, sweeps)
    load = state.load.reshape(load.shape)
    refused = np.zeros((layers, experts, ranks), np.bool_)
    over = np.maximum(load.sum(3).max(2) - target_LM, 0).sum(1)
    active = np.flatnonzero(over)
    for _ in range(tries):
        found, expert, rank = _best(expert_LRQ[active], load[active], target_LM[active], refused[active], slots)
        active, expert, rank = active[found], expert[found], rank[found]
        if not len(active):
            break
        at = np.arange(len(active))
        used = load[active, :, rank].sum(1)  # [B, Q]
        used[:, : held.shape[2]] = np.iinfo(np.int64).max
        used[expert_LRQ[active, rank] < 0] = np.iinfo(np.int64).max
        place = used.argmin(1)
        new, now = load[active], expert_LRQ[active]
        gone = now[at, rank, place]
        owner = solution.home[active, gone]
        new[at, :, owner, (now[at, owner] == gone[:, None]).argmax(1)] += new[at, :, rank, place]
        new[at, :, rank, place] = 0
        now[at, rank, place] = expert
        state = _slots(now, new)
        level_slots(state, target_LM[active].reshape(-1), experts, sweeps)
        new = state.load.reshape(new.shape)
        left = np.maximum(new.sum(3).max(2) - target_LM[active], 0).sum(1)
        good = left < over[active]
        better = active[good]
        load[better], expert_LRQ[better], over[better] = new[good], now[good], left[good]
        refused[active[~good], expert[~good], rank[~good]] = True
        refused[better, gone[good], rank[good]] = True
        active = active[over[active] > 0]
    solution.replicas[:] = np.where(solution.kept, expert_LRQ[:, :, held.shape[2] :], -1)[:, None]
    solution.quota[:] = load[..., held.shape[2] :]


def _loads(table_LME: np.ndarray, solution: Solution, held_LRC: np.ndarray) -> np.ndarray:
    """int64 [L, M, R, Q]: what home slots and replica slots compute."""
    left = table_LME.astype(np.int64)
    at = np.nonzero(solution.quota)
    np.subtract.at(left, (at[0], at[1], solution.replicas[at]), solution.quota[at].astype(np.int64))
    at_home = np.take_along_axis(left, np.maximum(held_LRC, 0).reshape(len(left), 1, -1), 2)
    at_home = np.where(held_LRC[:, None] >= 0, at_home.reshape(*left.shape[:2], *held_LRC.shape[1:]), 0)
    return np.concatenate([at_home, solution.quota], 3)


def _slots(expert_BRQ: np.ndarray, load_BMRQ: np.ndarray) -> Slots:
    """All micro-batches of some layers, as pairs without free slots."""
    whole = np.broadcast_to(expert_BRQ[:, None], load_BMRQ.shape).reshape(-1, *expert_BRQ.shape[1:])
    load = load_BMRQ.reshape(whole.shape).copy()
    return Slots(whole.copy(), load, np.zeros(load.shape[:2], np.int64), np.zeros(load.shape, np.bool_))


def _best(
    expert_BRQ: np.ndarray, load_BMRQ: np.ndarray, target_BM: np.ndarray, refused_BER: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [B], whether there is one, and the expert and the rank of the replica that promises most."""
    layers, micro_batches, ranks, places = load_BMRQ.shape
    experts = refused_BER.shape[1]
    if not layers:
        return np.zeros(0, np.bool_), np.zeros(0, np.int64), np.zeros(0, np.int64)
    state, target = _slots(expert_BRQ, load_BMRQ), target_BM.reshape(-1)
    flow, _ = flow_of_slots(state, experts)
    full = np.repeat(target, ranks)
    steps, _ = flow.distances(flow.load < full, np.ones(len(flow.load), np.bool_))
    stuck = (steps >= FAR).reshape(-1, ranks)
    excess = np.where(stuck, np.maximum(flow.load - full, 0).reshape(stuck.shape), 0).sum(1)
    pair, rank, place = np.nonzero((state.expert >= 0) & stuck[:, :, None] & (excess > 0)[:, None, None])
    key = pair * experts + state.expert[pair, rank, place]
    inside = np.bincount(key, weights=state.load[pair, rank, place], minlength=len(target) * experts)
    helps = np.minimum(inside.reshape(-1, experts), excess[:, None]).reshape(layers, micro_batches, experts)
    score = np.matmul(helps.swapaxes(1, 2), (~stuck).reshape(layers, micro_batches, ranks).astype(np.float64))
    score[refused_BER] = 0
    layer, rank, place = np.nonzero(expert_BRQ >= 0)
    score[layer, expert_BRQ[layer, rank, place], rank] = 0
    none_kept: np.ndarray = np.all(expert_BRQ[:, :, places - slots :] < 0, axis=2)
    score = np.where(none_kept[:, None], 0, score)
    hosts = best_host(score)  # [B, E]
    worth = np.take_along_axis(score, hosts[:, :, None], 2)[:, :, 0]
    expert, at = worth.argmax(1), np.arange(layers)
    return worth[at, expert] > 0, expert, hosts[at, expert]
