"""Intra-batch replication: which experts each micro-batch copies inside a node, and how many assignments move.

Every (layer, micro-batch, node) is a group, and all groups are worked on at once; arrays have the group axis last, so
that each step is a few operations over long rows. For a threshold T, overloaded ranks fill ranks that have room and a
free slot *exactly* to T, hottest expert first: a host then needs no second donor, and G ranks at most G - 1 replicas.
T starts at the mean over all ranks and is searched upwards where that cannot be reached.
"""

from dataclasses import dataclass, fields, replace

import numpy as np


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
        return Moves(*(getattr(self, field.name)[keep] for field in fields(Moves)))

    def replaced(self, columns: np.ndarray, other: "Moves", count: int) -> "Moves":
        """These, with those of the groups `columns` exchanged for `other`, whose groups are indices into `columns`."""
        gone = np.zeros(count, np.bool_)
        gone[columns] = True
        kept = self.where(~gone[self.group])
        moved = Moves(columns[other.group], other.donor, other.index, other.host, other.amount)
        return Moves(*(np.concatenate([getattr(kept, f.name), getattr(moved, f.name)]) for f in fields(Moves)))


@dataclass(frozen=True)
class Effort:
    """How hard to look.

    rules: how many greedy rules are tried on a group that T was not reached in
    steps: halvings of the interval in which the lowest T in reach lies
    least: assignments below which a transfer is not worth the weights that it sends
    """

    rules: int
    steps: int
    least: int


def replicate(groups: Groups, target_X: np.ndarray, micro_batch_X: np.ndarray, effort: Effort) -> Moves:
    """Bring every group down to its target, or as low as it gets; groups of one (layer, micro-batch) share that T."""
    best_T, moves = _lowest(groups, target_X, effort)
    worst = np.zeros(int(micro_batch_X.max(initial=-1)) + 1, np.int64)
    np.maximum.at(worst, micro_batch_X, best_T)
    # A group need not be better than the worst one of its micro-batch: fewer replicas do.
    shared = worst[micro_batch_X]
    relaxed = np.flatnonzero(shared > best_T)
    reached, cheaper = fill(groups.take(relaxed), shared[relaxed], effort)
    good = reached <= shared[relaxed]
    position = np.cumsum(good) - 1
    cheaper = cheaper.where(good[cheaper.group])
    cheaper = Moves(position[cheaper.group], cheaper.donor, cheaper.index, cheaper.host, cheaper.amount)
    return moves.replaced(relaxed[good], cheaper, len(best_T))


def _lowest(groups: Groups, target_X: np.ndarray, effort: Effort) -> tuple[np.ndarray, Moves]:
    """The lowest busiest rank found in each group that is not below its target, and the transfers to it."""
    reached, moves = fill(groups, target_X, effort)
    best = np.maximum(reached, target_X)
    low, high = target_X.copy(), best.copy()  # not reached at low; reached at high
    effort = replace(effort, rules=min(effort.rules, 2))  # many thresholds, few rules for each
    for _ in range(effort.steps):
        columns = np.flatnonzero(high - low > np.maximum(1, target_X >> 11))
        if not len(columns):
            break
        middle = (low[columns] + high[columns]) // 2
        got, tried = fill(groups.take(columns), middle, effort)
        got = np.maximum(got, target_X[columns])
        better = got < best[columns]
        position = np.cumsum(better) - 1
        tried = tried.where(better[tried.group])
        tried = Moves(position[tried.group], tried.donor, tried.index, tried.host, tried.amount)
        moves = moves.replaced(columns[better], tried, len(best))
        best[columns[better]] = got[better]
        fits = got <= middle
        high[columns[fits]] = middle[fits]
        low[columns[~fits]] = middle[~fits]
        np.minimum(high, best, out=high)
    return best, moves


def fill(groups: Groups, T_X: np.ndarray, effort: Effort) -> tuple[np.ndarray, Moves]:
    """Transfers towards T, and the load of the busiest rank that they lead to, int64 [X]: the best of several rules."""
    reached, moves = _fill(groups, T_X, 0, effort.least)
    for rule in range(1, effort.rules):
        columns = np.flatnonzero(reached >= T_X + effort.least)
        if not len(columns):
            break
        got, tried = _fill(groups.take(columns), T_X[columns], rule, effort.least)
        better = got < reached[columns]
        position = np.cumsum(better) - 1
        tried = tried.where(better[tried.group])
        tried = Moves(position[tried.group], tried.donor, tried.index, tried.host, tried.amount)
        moves = moves.replaced(columns[better], tried, len(reached))
        reached[columns[better]] = got[better]
    return reached, moves


def _fill(groups: Groups, T_X: np.ndarray, rule: int, least: int) -> tuple[np.ndarray, Moves]:
    """One greedy rule. Even rules take the most overloaded rank as donor, odd ones the overloaded rank with the hottest
    expert; from the third on, ranks are preferred by factors that differ from rule to rule."""
    load, rest, free = groups.load_GX.copy(), groups.rest_CGX.copy(), groups.free_GX.copy()
    rank = np.arange(len(load))[:, None]
    as_donor, as_host = (512 + (((rank + 1) * rule * factor) >> 3) % 1024 for factor in (40503, 30011))
    active = np.arange(load.shape[1])
    parts = [[np.zeros(0, np.int64)] * 5]
    while len(active):
        part_load, T = load[:, active], T_X[active]
        column = np.arange(len(active))
        wish = rest[:, :, active].max(0) if rule % 2 else part_load - T
        if rule > 1:
            wish = wish * as_donor
        donor = np.where(part_load >= T + least, wish, -1).argmax(0)
        over = part_load[donor, column] - T
        of_donor = rest[:, donor, active]
        index = of_donor.argmax(0)
        hot = of_donor[index, column]
        slots = free[:, active]
        space = np.where(slots > 0, T - part_load, 0)
        # The roomiest host that the expert can fill; if there is none, the one with most slots, least room first.
        fits = np.where(space <= hot, space, 0)
        if rule > 1:
            fits = fits * as_host
        other = np.where(space >= least, (slots << 40) - space, 0)
        host = np.where(fits.max(0) >= least, fits.argmax(0), other.argmax(0))
        amount = np.minimum(hot, space[host, column])
        keep = (over >= least) & (amount >= least)
        active, donor, index, host, amount = (x[keep] for x in (active, donor, index, host, amount))
        load[donor, active] -= amount
        load[host, active] += amount
        rest[index, donor, active] -= amount
        free[host, active] -= 1
        parts.append([active, donor, index, host, amount])
    return load.max(0), Moves(*(np.concatenate(column) for column in zip(*parts, strict=True)))
