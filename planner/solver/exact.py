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
        self.first = np.flatnonzero(np.diff(expert, prepend=-1))  # of every expert
        self.group = np.repeat(np.arange(len(self.first)), np.diff(self.first, append=len(expert)))
        self.by_rank = np.argsort(rank, kind="stable")
        in_order = rank[self.by_rank]
        self.first_of_rank = np.flatnonzero(np.diff(in_order, prepend=-1))
        self.present = in_order[self.first_of_rank]  # ranks that have such hosts

    def _of_rank(self, values_H: np.ndarray) -> np.ndarray:
        out = np.zeros(len(self.load), np.int64)
        out[self.present] = np.add.reduceat(values_H[self.by_rank], self.first_of_rank)
        return out

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
        steps, via = np.where(sinks, np.int32(0), FAR), np.zeros(0, np.int32)
        if not len(self.expert):
            return steps, via
        givers = self.by_rank[self.split[self.by_rank] > 0]
        at = self.rank[givers]
        first = np.flatnonzero(np.diff(at, prepend=-1))
        present, experts = at[first], self.group[givers]
        for hop in range(1, self.ranks + 1):
            via = np.minimum.reduceat(steps[self.rank], self.first)
            reached = np.minimum.reduceat(via[experts], first) if len(first) else via[:0]
            new = present[(reached == hop - 1) & (steps[present] >= FAR)]
            if not len(new):
                break
            steps[new] = hop
            if (steps[wanted] < FAR).all():
                break
        return steps, via

    def _push(self, step: int, steps: np.ndarray, via: np.ndarray, limit: np.ndarray) -> None:
        """Move what ranks at this distance have above the limit one hop nearer. Only hosts that take part are
        touched."""
        busy = (self.load > limit) & (steps == step)
        if not busy.any():
            return
        of = self.by_rank[np.flatnonzero(busy[self.rank[self.by_rank]])]
        of = of[(via[self.group[of]] == step - 1) & (self.split[of] > 0)]
        rank = self.rank[of]
        first = np.flatnonzero(np.diff(rank, prepend=-1))
        giver = rank[first]
        taken = _fill(self.split[of], first, (self.load - limit)[giver])
        of, rank, taken = of[taken > 0], rank[taken > 0], taken[taken > 0]
        flow = np.zeros(len(self.first), np.int64)
        np.add.at(flow, self.group[of], taken)
        self.split[of] -= taken
        np.subtract.at(self.load, rank, taken)

        moved = np.flatnonzero(flow)
        size = np.append(self.first, len(self.expert))[moved + 1] - self.first[moved]
        to = np.repeat(self.first[moved] - np.cumsum(size) + size, size) + np.arange(size.sum())
        to = to[steps[self.rank[to]] == step - 1]
        if step == 1:
            room = np.maximum((limit - self.load)[self.rank[to]], 0)
        else:  # what a rank can pass on
            onward = np.where((steps[self.rank] == step - 1) & (via[self.group] == step - 2), self.split, 0)
            room = self._of_rank(onward)[self.rank[to]]
        first = np.flatnonzero(np.diff(self.group[to], prepend=-1))
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
