"""Fetched replicas: what kept ones leave over, micro-batch by micro-batch, inside nodes.

Step by step, the busiest rank of a node gives assignments of one of its experts to another rank of the node. The taker
has room, a free slot, and not yet this expert. Of all such pairs of expert and taker, the one is chosen that moves most
assignments: until the taker is full, or the giver is down at the limit. A taker that is full needs no second giver, so
G ranks need at most G - 1 replicas as long as experts are large enough.

The limit is the target that the caller names. Where some node has more than that a rank even when its own ranks share
its load evenly, the limit of all nodes is the mean of the fullest one: the layer waits for that node anyway.
"""

from dataclasses import dataclass

import numpy as np

from .hosts import best_host


@dataclass(frozen=True, eq=False)
class FetchPrice:
    """What a fetched replica costs and saves, in seconds, and how ranks are levelled with it.

    Attributes:
        slots: of a rank, at most so many hold fetched replicas.
        assignment: saved by one assignment less on the busiest rank.
        replica: cost of one more replica that leaves the busiest sender.
        any: cost of fetching at all in a layer and micro-batch, however many.
        tolerance: a rank may stay above its target by this part of it, in all layers or in each, [L].
        hottest: as in `fetch`.
    """

    slots: int
    assignment: float
    replica: float
    any: float
    tolerance: float | np.ndarray = 0.0
    hottest: bool = False


@dataclass(eq=False)
class Slots:
    """P pairs of layer and micro-batch, with what every slot of their ranks holds and computes; changed in place.

    expert: int64 [P, R, Q], -1 in empty ones. load: int64 [P, R, Q]. free: int64 [P, R], slots that may be filled.
    fetched: bool [P, R, Q].
    """

    expert: np.ndarray
    load: np.ndarray
    free: np.ndarray
    fetched: np.ndarray

    def of_pairs(self, pairs: np.ndarray) -> "Slots":
        return Slots(*(array[pairs] for array in vars(self).values()))

    def put(self, pairs: np.ndarray, other: "Slots") -> None:
        for name, array in vars(other).items():
            getattr(self, name)[pairs] = array


def fetch(slots: Slots, target_P: np.ndarray, gpus_per_node: int, hottest: bool = False) -> np.ndarray:
    """Add fetched replicas until the targets are met. Returns int64 [P]: the most replicas that one rank sends.

    hottest: not the expert and taker with which most moves, but the giver's hottest expert and the roomiest taker.
    """
    pairs, ranks, places = slots.expert.shape
    nodes = ranks // gpus_per_node
    of_node = slots.load.sum(2).reshape(pairs, nodes, gpus_per_node).sum(2)
    limit = np.maximum(target_P, (-(-of_node // gpus_per_node)).max(1))
    expert, load, fetched = (
        array.reshape(pairs * nodes, gpus_per_node, places) for array in (slots.expert, slots.load, slots.fetched)
    )
    free, limit = slots.free.reshape(-1, gpus_per_node), np.repeat(limit, nodes)
    total = load.sum(2)
    sent = np.zeros((pairs * nodes, gpus_per_node), np.int64)
    stuck = np.zeros(total.shape, np.bool_)  # ranks that cannot hand on anything
    row = np.flatnonzero((total > limit[:, None]).any(1))
    while len(row):
        at = np.arange(len(row))
        top = limit[row]
        donor = np.where(stuck[row], -1, total[row]).argmax(1)
        excess = total[row, donor] - top
        what = np.where(fetched[row, donor], -1, expert[row, donor])  # [B, Q]
        holds = np.zeros((len(row), places, gpus_per_node), np.bool_)
        for place in range(places):
            holds |= expert[row, :, place][:, None] == what[:, :, None]
        room = np.where(free[row] > 0, top[:, None] - total[row], 0)[:, None]
        amount = np.where(holds, 0, np.minimum(room, np.minimum(load[row, donor], excess[:, None])[:, :, None]))
        amount[what < 0] = 0
        rated = amount
        if hottest:  # by the load of the expert, then by the taker's room
            rated = (amount > 0) * (load[row, donor][:, :, None] * (top.max() + 1) + room)
        hosts = best_host(rated)  # [B, Q]
        place = np.take_along_axis(rated, hosts[:, :, None], 2)[:, :, 0].argmax(1)
        host = hosts[at, place]
        amount = amount[at, place, host]
        go = amount > 0
        stuck[row[~go], donor[~go]] = True
        to = row[go]
        donor, place, host, amount, what = donor[go], place[go], host[go], amount[go], what[at, place][go]
        new = (expert[to, host] < 0).argmax(1)
        expert[to, host, new], load[to, host, new], fetched[to, host, new] = what, amount, True
        load[to, donor, place] -= amount
        total[to, donor] -= amount
        total[to, host] += amount
        free[to, host] -= 1
        sent[to, donor] += 1
        row = row[((total[row] > limit[row, None]) & ~stuck[row]).any(1)]
    return sent.reshape(pairs, ranks).max(1)
