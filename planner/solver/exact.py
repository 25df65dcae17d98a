"""The exact split: whole assignments to given hosts, so that the busiest rank has as few as any split allows.

A maximum flow, for many pairs of layer and micro-batch at once. Every pair has a limit for its ranks. What a rank has
above it is pushed along shortest paths to ranks below it: from a rank to an expert that it computes some of, and on to
that expert's other hosts. A sweep finds all distances anew, then pushes from the farthest ranks inwards (push-relabel
with exact labels).

A rank above the limit may reach no rank below it. Then no split can move assignments out of the set of ranks that it
reaches. The mean load of the set, rounded up, is a lower bound for the busiest rank, and becomes the limit. So a limit
that was raised and is met in the end is the optimum.
"""

import numpy as np

FAR = np.int32(1 << 20)  # hops; small integers, since most of the time goes into moving them


class PairFlow:
    """A split of P pairs, each with its own hosts of experts that have several. Integers throughout.

    expert, rank: int64 [H], pair * E + e and pair * R + r, sorted by expert and rank
    split: int64 [H], what each host computes
    load:  int64 [P * R], of every rank, with experts that have one host only
    """

    def __init__(
        self, expert: np.ndarray, rank: np.ndarray, split: np.ndarray, load: np.ndarray, experts: int, ranks: int
    ) -> None:
        self.expert, self.rank, self.split, self.load = expert, rank, split, load
        self.pairs, self.experts, self.ranks = len(load) // ranks, experts, ranks
        self.first = starts(expert)  # of every expert
        self.group = np.repeat(np.arange(len(self.first)), np.diff(self.first, append=len(expert)))
        self.by_rank = np.argsort(rank, kind="stable")
        self.at_rank = np.bincount(rank, minlength=len(load))  # how many hosts
        self.from_rank = np.cumsum(self.at_rank) - self.at_rank  # where they begin in `by_rank`

    def _hosts_at(self, ranks: np.ndarray) -> np.ndarray:
        """The hosts on some ranks, rank by rank."""
        return self.by_rank[spans(self.from_rank[ranks], self.at_rank[ranks])]

    def busiest(self) -> np.ndarray:
        """int64 [P]."""
        return self.load.reshape(self.pairs, self.ranks).max(1)

    def level(self, limit_P: np.ndarray, sweeps: int = 1 << 20) -> np.ndarray:
        """Push until no rank is above its pair's limit, raised as far as need be; the limits then, int64 [P].

        After so many `sweeps` it ends in any case; a pair that is not done then has its busiest rank as its limit.
        """
        limit = limit_P.copy()
        for done in range(sweeps):
            over = self.load > np.repeat(limit, self.ranks)
            active = np.flatnonzero(over.reshape(self.pairs, self.ranks).any(1))
            if not len(active):
                return limit
            if 2 * len(active) < self.pairs:  # the rest is done
                part, where, ranks = self.of_pairs(active)
                limit[active] = part.level(limit[active], sweeps - done)
                self.split[where], self.load[ranks] = part.split, part.load
                return limit
            self._sweep(limit, over)
        return np.maximum(limit, self.busiest())

    def of_pairs(self, pairs: np.ndarray) -> tuple["PairFlow", np.ndarray, np.ndarray]:
        """The flow of some pairs alone, which of the hosts are theirs, and which of the ranks."""
        new = np.full(self.pairs, -1)
        new[pairs] = np.arange(len(pairs))
        pair = self.rank // self.ranks
        where = np.flatnonzero(new[pair] >= 0)
        shift = new[pair[where]] - pair[where]
        part = PairFlow(
            self.expert[where] + shift * self.experts,
            self.rank[where] + shift * self.ranks,
            self.split[where],
            self.load.reshape(self.pairs, self.ranks)[pairs].reshape(-1),
            self.experts,
            self.ranks,
        )
        return part, where, (pairs[:, None] * self.ranks + np.arange(self.ranks)).reshape(-1)

    def _sweep(self, limit: np.ndarray, over: np.ndarray) -> None:
        """Raise the limits of pairs that are stuck, then push everything above the limits one way along its paths."""
        steps, via = self.distances(self.load < np.repeat(limit, self.ranks), over)
        far = (steps >= FAR).reshape(self.pairs, self.ranks)
        stuck: np.ndarray = np.any(over.reshape(far.shape) & far, axis=1)
        if stuck.any():
            inside = far & stuck[:, None]
            held = np.where(inside, self.load.reshape(far.shape), 0).sum(1)
            bound = -(-held // np.maximum(inside.sum(1), 1))
            np.copyto(limit, np.maximum(bound, limit), where=stuck)
        farthest = int(np.where(over & (steps < FAR), steps, 0).max())
        for step in range(farthest, 0, -1):
            self._push(step, steps, via, np.repeat(limit, self.ranks))

    def distances(self, sinks: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hops from every rank to the nearest sink, int32 [P * R], and from every expert, [groups]; far where there is
        no way. Ranks farther than all wanted ones may be called far."""
        steps = np.where(sinks, np.int32(0), FAR)
        via = np.full(len(self.first), FAR)
        size = np.diff(self.first, append=len(self.expert))
        scratch = np.empty(max(len(steps), len(via)), np.int64)
        via[self.group[sinks[self.rank]]] = 0
        givers = np.flatnonzero((via[self.group] == 0) & (self.split > 0))
        for hop in range(1, self.ranks + 1):
            reached = self.rank[givers]
            reached = _once(reached[steps[reached] >= FAR], scratch)
            steps[reached] = hop
            if not len(reached) or (steps[wanted] < FAR).all():
                break
            passing = self.group[self._hosts_at(reached)]
            passing = _once(passing[via[passing] >= FAR], scratch)
            via[passing] = hop
            givers = spans(self.first[passing], size[passing])
            givers = givers[self.split[givers] > 0]
        return steps, via

    def _push(self, step: int, steps: np.ndarray, via: np.ndarray, limit: np.ndarray) -> None:
        """Move what ranks at this distance have above the limit one hop nearer. Only hosts that take part are
        touched."""
        busy = (self.load > limit) & (steps == step)
        if not busy.any():
            return
        of = self._hosts_at(np.flatnonzero(busy))
        of = of[(via[self.group[of]] == step - 1) & (self.split[of] > 0)]
        rank = self.rank[of]
        first = starts(rank)
        giver = rank[first]
        taken = _fill(self.split[of], first, (self.load - limit)[giver])
        of, rank, taken = of[taken > 0], rank[taken > 0], taken[taken > 0]
        flow = np.zeros(len(self.first), np.int64)
        np.add.at(flow, self.group[of], taken)
        self.split[of] -= taken
        np.subtract.at(self.load, rank, taken)

        moved = np.flatnonzero(flow)
        size = np.append(self.first, len(self.expert))[moved + 1] - self.first[moved]
        to = spans(self.first[moved], size)
        to = to[steps[self.rank[to]] == step - 1]
        if step == 1:
            room = np.maximum((limit - self.load)[self.rank[to]], 0)
        else:  # what a rank can pass on
            takers = np.unique(self.rank[to])
            onward = self._hosts_at(takers)
            amount = np.where(via[self.group[onward]] == step - 2, self.split[onward], 0)
            size = self.at_rank[takers]
            room = np.add.reduceat(amount, np.cumsum(size) - size)[np.searchsorted(takers, self.rank[to])]
        first = starts(self.group[to])
        amount = flow[self.group[to[first]]]
        given = _fill(room, first, amount)
        given[first] += amount - np.add.reduceat(given, first)  # more than there is room for: later sweeps pass it on
        self.split[to] += given
        np.add.at(self.load, self.rank[to], given)


def _fill(room: np.ndarray, first: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """How much of each group's amount goes to each of its members in turn, none getting more than its room."""
    upto = np.cumsum(room)
    size = np.diff(first, append=len(room))
    before = np.repeat(upto[first] - room[first], size)
    return np.clip(np.repeat(amount, size) - (upto - room - before), 0, room)


def _once(index: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Each of these numbers once. scratch: longer than the greatest, and overwritten."""
    turn = np.arange(len(index))
    scratch[index] = turn
    return index[scratch[index] == turn]


def starts(key: np.ndarray) -> np.ndarray:
    """Where each run of equal keys begins."""
    new = np.ones(len(key), np.bool_)
    np.not_equal(key[1:], key[:-1], out=new[1:])
    return np.flatnonzero(new)


def spans(start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... for size[0] of them, then those of start[1], and so on."""
    return np.repeat(start - np.cumsum(size) + size, size) + np.arange(size.sum())
