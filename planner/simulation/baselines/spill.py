"""Baselines that send weights for every micro-batch. Each is a rule that says to whom an overloaded rank gives work.

LLEP (Salesforce): experts in descending order; what the home has above its capacity spills to the least loaded ranks in
chunks of at least 1024 assignments, on any node; what is left in the end is forced onto the least loaded one. A
micro-batch whose max/mean is below 1.3 is left as it is.
UltraEP: in every NVLink domain, from the busiest rank's hottest expert to the rank with most room and a free slot.
MoonEP: the most overloaded rank fills the roomiest one exactly, with its experts in descending order. One rank fills
another, which so hosts at most E / R experts of others. Its authors' code runs inside one NVLink domain; here the whole
group counts as one.

Where a rule has no limit of slots, a rank needs memory for as many experts as it hosts at once in its worst
micro-batch. Those beyond the cluster's replica slots count as kept copies.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...plan import contiguous_home, held_experts
from ...pricing.outcome import Outcome, local_assignments

_CHUNK = 1024
_BYPASS = 1.3


def llep(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    spill = _Spill(table_LME, cluster, slots=table_LME.shape[2])
    busy = np.flatnonzero(spill.load.max(1) >= _BYPASS * np.maximum(spill.load.mean(1), 1e-9))
    order = np.argsort(-spill.left, axis=1, kind="stable")
    for position in range(spill.left.shape[1]):
        active, expert = busy, order[busy, position]
        for _ in range(cluster.num_ranks):
            home = spill.home[active, expert]
            excess = np.minimum(spill.left[active, expert], spill.load[active, home] - spill.capacity[active])
            go = excess > 0
            active, expert, home, excess = active[go], expert[go], home[go], excess[go]
            if not len(active):
                break
            others = spill.load[active].copy()
            others[np.arange(len(active)), home] = np.iinfo(np.int64).max
            host = others.argmin(1)
            room = spill.capacity[active] - spill.load[active, host]
            forced = (room < np.minimum(_CHUNK, excess)) | (excess < _CHUNK)
            lower = spill.load[active, host] + excess < spill.load[active, home]
            amount = np.where(forced, np.where(lower, excess, 0), np.minimum(excess, room))
            moved = amount > 0
            active, expert, host, amount, forced = (x[moved] for x in (active, expert, host, amount, forced))
            spill.give(active, expert, host, amount)
            active, expert = active[~forced], expert[~forced]
    return spill.outcome()


def ultraep(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    spill = _Spill(table_LME, cluster, slots=cluster.replica_slots)
    gpus = cluster.gpus_per_node
    mean = spill.load.reshape(len(spill.load), -1, gpus).sum(2)
    limit = np.repeat(-(-mean // gpus), gpus, axis=1)
    return spill.fill(limit, gpus)


def moonep(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    spill = _Spill(table_LME, cluster, slots=table_LME.shape[2])
    quota = _filled(spill.load - spill.capacity[:, None])  # [X, R, R]
    pair, giver = np.nonzero(quota.any(2))
    while len(pair):
        owed = quota[pair, giver]  # [B, R]
        host = owed.argmax(1)
        here = np.where(spill.home[pair] == giver[:, None], spill.left[pair], 0)
        expert = here.argmax(1)
        amount = np.minimum(owed.max(1), here.max(1))
        spill.give(pair, expert, host, amount)
        quota[pair, giver, host] -= amount
        more = quota[pair, giver].any(1)
        pair, giver = pair[more], giver[more]
    return spill.outcome()


def _filled(over_XR: np.ndarray) -> np.ndarray:
    """int64 [X, R, R], what each rank gives to each other. over_XR: loads above capacity.

    The most overloaded rank fills the roomiest one whole. Where that takes more than it has above its own capacity, it
    has room from then on, and is filled by another.
    """
    pairs, ranks = over_XR.shape
    over, quota = over_XR.copy(), np.zeros((pairs, ranks, ranks), np.int64)
    active = np.arange(pairs)
    while len(active):
        giver, host = over[active].argmax(1), over[active].argmin(1)
        go = over[active, giver] > 0
        active, giver, host = active[go], giver[go], host[go]
        quota[active, giver, host] = room = -over[active, host]
        over[active, giver] -= room
        over[active, host] = 0
    return quota


class _Spill:
    """X pairs of layer and micro-batch with contiguous homes; who has given what to whom."""

    def __init__(self, table_LME: np.ndarray, cluster: ClusterSpec, slots: int) -> None:
        self.shape, self.cluster, self.table = table_LME.shape, cluster, table_LME
        layers, micro_batches, experts = table_LME.shape
        home = contiguous_home(layers, experts, cluster.num_ranks)
        self.held = held_experts(home, cluster.num_ranks)
        self.home = np.repeat(home, micro_batches, axis=0)
        self.left = table_LME.reshape(-1, experts).astype(np.int64)
        pairs = len(self.left)
        self.load = np.zeros((pairs, cluster.num_ranks), np.int64)
        np.add.at(self.load, (np.arange(pairs)[:, None], self.home), self.left)
        self.capacity = -(-self.load.sum(1) // cluster.num_ranks)
        self.free = np.full(self.load.shape, slots)
        self.given: list[tuple[np.ndarray, ...]] = []

    def give(self, pair: np.ndarray, expert: np.ndarray, host: np.ndarray, amount: np.ndarray) -> None:
        self.left[pair, expert] -= amount
        self.load[pair, self.home[pair, expert]] -= amount
        self.load[pair, host] += amount
        self.free[pair, host] -= 1
        self.given.append((pair, expert, host, amount))

    def fill(self, limit: np.ndarray, domain: int) -> Outcome:
        """In every domain of so many ranks: the busiest rank's hottest expert to the rank with most room."""
        ranks = self.cluster.num_ranks
        for base in range(0, ranks, domain):
            span = slice(base, base + domain)
            pair = np.arange(len(self.load))
            for _ in range(domain * 4):
                over = self.load[pair, span] - limit[pair, span]
                donor = base + over.argmax(1)
                here = np.where(self.home[pair] == donor[:, None], self.left[pair], 0)
                expert = here.argmax(1)
                room = np.where(self.free[pair, span] > 0, -over, 0)
                host = base + room.argmax(1)
                amount = np.minimum(np.minimum(over.max(1), here.max(1)), room.max(1))
                go = amount > 0
                if not go.any():
                    break
                pair, expert, host, amount = pair[go], expert[go], host[go], amount[go]
                self.give(pair, expert, host, amount)
        return self.outcome()

    def outcome(self) -> Outcome:
        layers, micro_batches, experts = self.shape
        ranks, gpus = self.cluster.num_ranks, self.cluster.gpus_per_node
        parts = [np.concatenate(part) for part in zip(*self.given, strict=True)] if self.given else []
        pair, expert, host, amount = parts or (np.zeros(0, np.int64),) * 4
        key, index = np.unique((pair * ranks + host) * experts + expert, return_inverse=True)
        amount = np.bincount(index, weights=amount, minlength=len(key)).astype(np.int64)
        place, expert = np.divmod(key, experts)
        pair, host = np.divmod(place, ranks)
        slot = np.arange(len(key)) - np.searchsorted(place, place)
        slots = int(slot.max(initial=-1)) + 1
        foreign = np.zeros((len(self.left), ranks, slots), np.int64)
        foreign[pair, host, slot] = amount
        who = np.full(foreign.shape, -1, np.int64)
        who[pair, host, slot] = expert
        held = np.repeat(self.held, micro_batches, axis=0)
        at_home = np.take_along_axis(self.left, np.maximum(held, 0).reshape(len(held), -1), 1).reshape(held.shape)
        at_home = np.where(held >= 0, at_home, 0)
        shape = (layers, micro_batches, ranks, -1)
        slot_load = np.concatenate([at_home, foreign], 2).reshape(shape)
        wanted = (self.table / self.cluster.num_nodes)[:, :, None]
        local = local_assignments(np.concatenate([held, who], 2).reshape(shape), slot_load, wanted, gpus)
        home = self.home[pair, expert]
        near = home // gpus == host // gpus
        counts = {}
        for name, chosen, rank in (
            ("pushed_in", near, host),
            ("pushed_out", near, home),
            ("far_in", ~near, host),
            ("far_out", ~near, home),
        ):
            count = np.bincount(pair[chosen] * ranks + rank[chosen], minlength=self.load.size)
            counts[name] = count.reshape(layers, micro_batches, ranks)
        held_at_once = (foreign > 0).sum(2).reshape(-1, ranks).max(0)
        counts["kept_copies"] = np.maximum(held_at_once - self.cluster.replica_slots, 0)
        return Outcome.of(slot_load, local, **counts)
