"""Swap kept replicas for others in layers where some micro-batches stay uneven.

The exact split shows where work is stuck: on a set of overloaded ranks that share no expert with ranks that have room.
A new kept replica helps: an expert of which these ranks compute much, on a rank outside of the set. It takes the slot
of the least used kept replica of that rank. The swap stays if the exact split over all micro-batches of the layer is
better with it. Each round tries one swap in every layer.
"""

import numpy as np

from .held import Held
from .hosts import best_host
from .solution import Solution


def swap_kept(
    table_LME: np.ndarray, solution: Solution, target_LM: np.ndarray, tries: int = 48, sweeps: int = 200
) -> None:
    """Swap kept replicas, in place, of layers without fetched ones, until the targets are met or no swap helps.

    tries: swaps of a layer at most. sweeps: of each exact split at most.
    """
    layers, _, experts = table_LME.shape
    held = Held.of(table_LME, solution)
    held.level(target_LM, sweeps)
    refused = np.zeros((layers, experts, solution.kept.shape[1]), np.bool_)
    over = held.over(target_LM)
    active = np.flatnonzero(over)
    for _ in range(tries):
        if not len(active):
            break
        found, expert, rank = _best(held.of_layers(active), target_LM[active], refused[active])
        active, expert, rank = active[found], expert[found], rank[found]
        if not len(active):
            break
        new = held.of_layers(active)
        gone = _replace(new, expert, rank, solution.home[active])
        new.level(target_LM[active], sweeps)
        left = new.over(target_LM[active])
        good = left < over[active]
        better = active[good]
        held.put(better, new.of_layers(good))
        over[better] = left[good]
        refused[active[~good], expert[~good], rank[~good]] = True
        refused[better, gone[good], rank[good]] = True
        active = active[over[active] > 0]
    kept = held.expert_LRQ[:, :, held.home_slots :]
    solution.replicas[:] = np.where(solution.kept, kept, -1)[:, None]
    solution.quota[:] = held.load_LMRQ[..., held.home_slots :]


def _replace(held: Held, expert: np.ndarray, rank: np.ndarray, home_BE: np.ndarray) -> np.ndarray:
    """Put one expert a layer in the slot of the rank's least used kept replica, in place, which goes home with what it
    computes. Returns int64 [B], the experts that went."""
    at, homes = np.arange(len(expert)), held.home_slots
    now, load = held.expert_LRQ, held.load_LMRQ
    used = load[at, :, rank].sum(1)  # [B, Q]
    used[:, :homes] = np.iinfo(np.int64).max
    used[now[at, rank] < 0] = np.iinfo(np.int64).max
    place = used.argmin(1)
    gone = now[at, rank, place]
    owner = home_BE[at, gone]
    load[at, :, owner, (now[at, owner] == gone[:, None]).argmax(1)] += load[at, :, rank, place]
    load[at, :, rank, place] = 0
    now[at, rank, place] = expert
    return np.asarray(gone)


def _best(held: Held, target_BM: np.ndarray, refused_BER: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [B], whether there is one, and the expert and the rank of the replica that promises most."""
    layers, micro_batches = held.load_LMRQ.shape[:2]
    stuck, excess = held.stuck(target_BM)
    layer, micro_batch, rank, place = np.nonzero(
        (held.expert_LRQ >= 0)[:, None] & stuck[..., None] & (excess > 0)[..., None, None]
    )
    key = (layer * micro_batches + micro_batch) * held.experts + held.expert_LRQ[layer, rank, place]
    load = held.load_LMRQ[layer, micro_batch, rank, place]
    inside = np.bincount(key, weights=load, minlength=layers * micro_batches * held.experts)
    helps = np.minimum(inside.reshape(layers, micro_batches, held.experts), excess[:, :, None])
    score = np.matmul(helps.swapaxes(1, 2), (~stuck).astype(np.float64))
    score[refused_BER] = 0
    layer, rank, place = np.nonzero(held.expert_LRQ >= 0)
    score[layer, held.expert_LRQ[layer, rank, place], rank] = 0
    none_kept: np.ndarray = np.all(held.expert_LRQ[:, :, held.home_slots :] < 0, axis=2)
    score = np.where(none_kept[:, None], 0, score)
    hosts = best_host(score)  # [B, E]
    worth = np.take_along_axis(score, hosts[:, :, None], 2)[:, :, 0]
    expert, at = worth.argmax(1), np.arange(layers)
    return worth[at, expert] > 0, expert, hosts[at, expert]
