"""Swap homes of experts in layers where kept replicas leave some micro-batches uneven.

As for `kept_swaps.py`, the exact split shows the ranks on which work is stuck. A swap helps that takes an expert from
them of which they compute more, at home, than of the one that they get for it, in many such micro-batches. In every
layer, each expert's best partner is found by the sum of these differences, and of all such swaps the one is tried that
would take most of the excess away. It stays if the exact split over all micro-batches is better with it.
"""

import numpy as np

from .held import Held
from .solution import Solution

_TRIES = 3  # for every swap that may stay


def swap_homes(
    table_LME: np.ndarray,
    solution: Solution,
    place_LE: np.ndarray,
    target_LM: np.ndarray,
    most_swaps: int,
    sweeps: int,
) -> None:
    """Swap homes, in place, of layers without fetched replicas, until the targets are met or no swap helps.

    place_LE: where experts are inside their homes' ranks, exchanged with the homes. most_swaps: of a layer.
    sweeps: of each exact split at most.
    """
    layers, _, experts = table_LME.shape
    held = Held.of(table_LME, solution)
    held.level(target_LM, sweeps)
    refused = np.zeros((layers, experts, experts), np.bool_)
    swapped = np.zeros(layers, np.int64)
    over = held.over(target_LM)
    for _ in range(_TRIES * most_swaps):
        active = np.flatnonzero((over > 0) & (swapped < most_swaps))
        if not len(active):
            break
        found, first, second = _best(held.of_layers(active), solution.home[active], target_LM[active], refused[active])
        active, first, second = active[found], first[found], second[found]
        if not len(active):
            break
        new, home = held.of_layers(active), solution.home[active]
        _swap(new, home, first, second)
        new.level(target_LM[active], sweeps)
        left = new.over(target_LM[active])
        good = left < over[active]
        better = active[good]
        held.put(better, new.of_layers(good))
        over[better], solution.home[better] = left[good], home[good]
        one, other = first[good], second[good]
        place_LE[better, one], place_LE[better, other] = place_LE[better, other], place_LE[better, one]
        swapped[better] += 1
        refused[active, first, second] = refused[active, second, first] = True
    solution.quota[:] = held.load_LMRQ[..., held.home_slots :]


def _swap(held: Held, home_BE: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Swap the homes of two experts in every layer, in place, with what these compute there."""
    at = np.arange(len(first))
    one, other = home_BE[at, first], home_BE[at, second]
    expert, load = held.expert_LRQ, held.load_LMRQ
    here = (expert[at, one] == first[:, None]).argmax(1)
    there = (expert[at, other] == second[:, None]).argmax(1)
    expert[at, one, here], expert[at, other, there] = second, first
    load[at, :, one, here], load[at, :, other, there] = load[at, :, other, there], load[at, :, one, here]
    home_BE[at, first], home_BE[at, second] = other, one


def _best(
    held: Held, home_BE: np.ndarray, target_BM: np.ndarray, refused_BEE: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [B], whether there is one, and the two experts of the swap that promises most."""
    layers, _, ranks, _ = held.load_LMRQ.shape
    experts, at = held.experts, np.arange(layers)[:, None]
    stuck_BMR, excess = held.stuck(target_BM)
    stuck = np.ascontiguousarray(stuck_BMR.swapaxes(1, 2), np.float64)  # [B, R, M]
    size = np.maximum(stuck_BMR.sum(2), 1)
    at_home = _at_home(held)  # [B, E, M]
    # Whole numbers: what every expert computes at home in micro-batches in which each rank is stuck.
    inside = np.matmul(at_home * (excess > 0)[:, None], stuck.swapaxes(1, 2))  # [B, E, R]
    mine = np.take_along_axis(inside, home_BE[:, :, None], 2)
    gain = mine - np.take_along_axis(inside, np.broadcast_to(home_BE[:, None], refused_BEE.shape), 2)
    gain = gain + gain.swapaxes(1, 2)
    holds = np.zeros((layers, experts, ranks), np.bool_)
    layer, rank, place = np.nonzero(held.expert_LRQ >= 0)
    holds[layer, held.expert_LRQ[layer, rank, place], rank] = True
    there = np.take_along_axis(holds, np.broadcast_to(home_BE[:, None], refused_BEE.shape), 2)
    gain[refused_BEE | there | there.swapaxes(1, 2)] = 0
    partner = gain.argmax(2)  # [B, E]
    less = at_home - at_home[at, partner]  # [B, E, M]
    leaves = stuck[at, home_BE] - stuck[at, home_BE[at, partner]]
    after = np.maximum(excess[:, None] - leaves * less, 0)
    worth = np.floor((excess[:, None] - after) / size[:, None]).sum(2)
    worth[np.take_along_axis(gain, partner[:, :, None], 2)[:, :, 0] <= 0] = 0
    best, row = worth.argmax(1), at[:, 0]
    return worth[row, best] > 0, best, partner[row, best]


def _at_home(held: Held) -> np.ndarray:
    """float64 [L, E, M] of whole numbers: what every expert computes at home."""
    layers, micro_batches = held.load_LMRQ.shape[:2]
    layer, rank, place = np.nonzero(held.expert_LRQ[:, :, : held.home_slots] >= 0)
    out = np.zeros((layers, held.experts, micro_batches))
    out[layer, held.expert_LRQ[layer, rank, place]] = held.load_LMRQ[layer, :, rank, place]
    return out
