"""Intra-batch replication: which experts each micro-batch copies inside a node, and how many assignments move.

Every (layer, micro-batch, node) is a group, and all groups are worked on at once; arrays have the group axis last, so
that each step is a few operations over long rows. For a threshold T, the most loaded rank of a group fills the roomiest
rank that has a free slot, with its hottest expert, until no rank is above T or nothing fits. T starts at the mean over
all ranks and is searched upwards where that cannot be reached.
"""

from dataclasses import dataclass

import numpy as np

_SEARCH_STEPS = 8  # halvings of the interval in which the lowest reachable T lies


@dataclass(frozen=True, eq=False)
class Groups:
    """Ranks and their experts by group: G ranks a node, C home experts a rank, X groups.

    load_GX: assignments on each rank; rest_CGX: what each home expert still has at home; free_GX: replica slots left.
    """

    load_GX: np.ndarray
    rest_CGX: np.ndarray
    free_GX: np.ndarray

    def take(self, columns: np.ndarray) -> "Groups":
        return Groups(self.load_GX[:, columns], self.rest_CGX[:, :, columns], self.free_GX[:, columns])


@dataclass(frozen=True, eq=False)
class Moves:
    """Transfers: in `group`, home expert `index` of rank `donor` gives `amount` assignments to rank `host`."""

    group: np.ndarray
    donor: np.ndarray
    index: np.ndarray
    host: np.ndarray
    amount: np.ndarray

    def where(self, keep: np.ndarray) -> "Moves":
        return Moves(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: "list[Moves]") -> "Moves":
        names = Moves.__dataclass_fields__
        return Moves(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def replicate(groups: Groups, target_X: np.ndarray, micro_batch_X: np.ndarray) -> Moves:
    """Bring every group down to its target, or as low as it gets; groups of one (layer, micro-batch) share that T."""
    best_T, moves = _lowest(groups, target_X)
    worst = np.zeros(int(micro_batch_X.max(initial=-1)) + 1, np.int64)
    np.maximum.at(worst, micro_batch_X, best_T)
    shared = worst[micro_batch_X]
    # A group need not be better than the worst one of its micro-batch: fewer replicas do.
    relaxed = np.flatnonzero(shared > best_T)
    reached, cheaper = fill(groups.take(relaxed), shared[relaxed])
    good = np.zeros(len(best_T), bool)
    good[relaxed[reached <= shared[relaxed]]] = True
    kept = moves.where(~good[moves.group])
    cheaper = Moves(relaxed[cheaper.group], cheaper.donor, cheaper.index, cheaper.host, cheaper.amount)
    return Moves.join([kept, cheaper.where(good[cheaper.group])])


def _lowest(groups: Groups, target_X: np.ndarray) -> tuple[np.ndarray, Moves]:
    """The lowest busiest rank found in each group that is not below its target, and the transfers to it."""
    reached, moves = fill(groups, target_X)
    best = np.maximum(reached, target_X)
    low, high = target_X.copy(), best.copy()  # not reached at low; reached at high
    for _ in range(_SEARCH_STEPS):
        open_X = np.flatnonzero(high - low > 1)
        if not len(open_X):
            break
        middle = (low[open_X] + high[open_X]) // 2
        got, tried = fill(groups.take(open_X), middle)
        better = got < best[open_X]
        improved = np.zeros(len(best), bool)
        improved[open_X[better]] = True
        best[open_X[better]] = got[better]
        moves = Moves.join(
            [
                moves.where(~improved[moves.group]),
                Moves(open_X[tried.group], tried.donor, tried.index, tried.host, tried.amount).where(
                    better[tried.group]
                ),
            ]
        )
        fits = got <= middle
        high[open_X[fits]] = middle[fits]
        low[open_X[~fits]] = middle[~fits]
        np.minimum(high, best, out=high)
    return np.maximum(best, target_X), moves


def fill(groups: Groups, T_X: np.ndarray) -> tuple[np.ndarray, Moves]:
    """Transfers towards T by the greedy rule; also the load of the busiest rank that they lead to, int64 [X]."""
    load, rest, free = groups.load_GX.copy(), groups.rest_CGX.copy(), groups.free_GX.copy()
    active = np.arange(load.shape[1])
    parts = [Moves(*[np.zeros(0, np.int64)] * 5)]
    while len(active):
        part_load, part_free, T = load[:, active], free[:, active], T_X[active]
        column = np.arange(len(active))
        donor = part_load.argmax(0)
        over = part_load[donor, column] - T
        host = np.where(part_free > 0, T - part_load, -1).argmax(0)
        slots = part_free[host, column]
        space = np.where(slots > 0, T - part_load[host, column], 0)
        of_donor = rest[:, donor, active]
        index = of_donor.argmax(0)
        # On its last slot a host is filled to T, even if that takes the donor below T; before that, only the excess.
        amount = np.minimum(of_donor[index, column], np.where(slots == 1, space, np.minimum(space, over)))
        keep = (over > 0) & (amount > 0)
        move = Moves(active, donor, index, host, amount).where(keep)
        active = move.group
        load[move.donor, active] -= move.amount
        load[move.host, active] += move.amount
        rest[move.index, move.donor, active] -= move.amount
        free[move.host, active] -= 1
        parts.append(move)
    return load.max(0), Moves.join(parts)
