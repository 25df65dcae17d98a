"""The search for a plan of the layers that need one: placements, guests and replicas, tried until they are good."""

import numpy as np

from ..cluster import ClusterSpec
from ..plan import contiguous_home, rank_loads
from .effort import EFFORTS, SearchOptions
from .labels import bring_near, spread_guests
from .placement import place
from .replicas import Attempt, Replicas, find_replicas, keep_guests, target_load
from .replication import Effort

_GOOD_MEAN, _GOOD_WORST = 1.5e-3, 1e-2  # a layer this close to its target, in the mean and at worst, came out well
_FEW_NODES = 8  # up to which attempts are cheap
_GAIN, _PATIENCE = 0.9, 5  # attempts in a row that leave more than this part of the excess, after which a search ends


class _Best:
    """The best plan found for every layer, and by how much its busiest ranks exceed their target, relative to it."""

    def __init__(self, table_LME: np.ndarray, cluster: ClusterSpec, target_LM: np.ndarray, slack: int) -> None:
        layers, micro_batches, experts = table_LME.shape
        self.home = np.zeros((layers, experts), np.int32)
        self.replicas = Replicas.none(layers, micro_batches, cluster.num_ranks, cluster.replica_slots)
        self.excess_LM = np.full((layers, micro_batches), np.inf)
        self._table, self._target, self._slack = table_LME, target_LM, slack

    def unfinished(self) -> np.ndarray:
        """bool [L]: layers that are not good yet."""
        return (self.excess_LM.mean(1) > _GOOD_MEAN) | (self.excess_LM.max(1) > _GOOD_WORST)

    def keep(self, layer: np.ndarray, home: np.ndarray, other: Replicas) -> np.ndarray:
        """Take what is better for these layers; bool [layers], where it is much better."""
        target = self._target[layer]
        busiest = rank_loads(self._table[layer], home, other.replicas, other.quota).max(2)
        excess = np.maximum(busiest - target - self._slack, 0) / np.maximum(target, 1)
        before, after = _score(self.excess_LM[layer]), _score(excess)
        chosen = np.flatnonzero(after < before)
        self.replicas.put(layer[chosen], other, chosen)
        self.home[layer[chosen]] = home[chosen]
        self.excess_LM[layer[chosen]] = excess[chosen]
        return after < _GAIN * before


def plan_layers(
    table: np.ndarray,
    cluster: ClusterSpec,
    previous: np.ndarray | None,
    options: SearchOptions,
    wanted_LNE: np.ndarray | None,
) -> tuple[np.ndarray, Replicas]:
    """Placement [L, E] and replicas of layers. `wanted_LNE`: see labels.py."""
    layers, _, experts = table.shape
    target = target_load(table, cluster.num_ranks, options.balance)
    best = _Best(table, cluster, target, options.min_quota - 1)
    for guests_a_rank in _guest_counts(cluster, options):
        _search(best, table, cluster, target, previous, options, guests_a_rank)
    home, found = best.home, best.replicas
    if wanted_LNE is not None and previous is None:
        bring_near(wanted_LNE, home, found, cluster)
    if found.guests.any() and previous is None:
        spread_guests(home, found, cluster)
    if options.max_kept is not None and found.guests.any():
        attempt = _attempts(options, cluster.replica_slots)[0]
        _limit_guests(table, home, cluster, target, attempt, found, options.max_kept)

    # Never worse than to leave experts where they are.
    stay = contiguous_home(layers, experts, cluster.num_ranks) if previous is None else previous
    ours = rank_loads(table, home, found.replicas, found.quota).max(2)
    theirs = rank_loads(table, stay, found.replicas[..., :0], found.quota[..., :0]).max(2)
    total = np.maximum(table.sum(2), 1)
    worse = np.flatnonzero((ours.sum(1) > theirs.sum(1)) | ((ours / total).sum(1) > (theirs / total).sum(1)))
    if len(worse):
        home[worse] = stay[worse]
        inside = find_replicas(table[worse], stay[worse], cluster, target[worse], _attempts(options, 0)[0])
        found.put(worse, inside, np.arange(len(worse)))
    return home, found


def _guest_counts(cluster: ClusterSpec, options: SearchOptions) -> tuple[int, ...]:
    """How many guests a rank to try, in turn, on the layers that are not good yet. A rank without a slot left for its
    own node's experts is a last resort: guests level nodes, and only replicas level the ranks inside."""
    if cluster.num_nodes == 1 or options.max_kept == 0:
        return (0,)
    most = min(2, cluster.replica_slots) if options.kept_slots is None else options.kept_slots
    usual = max(min(most, cluster.replica_slots - 1, 1), 0)
    if options.effort == "fast":
        return (usual,)
    more = range(1, most + 1) if cluster.num_nodes <= _FEW_NODES else ()
    return tuple(dict.fromkeys([usual, *more, 0]))


def _attempts(options: SearchOptions, guests_a_rank: int) -> list[Attempt]:
    effort = EFFORTS[options.effort]
    inside = Effort(effort.rules, effort.steps, options.min_quota)
    fills = effort.fills if guests_a_rank else effort.fills[:1]
    return [Attempt(fill, effort.slack, effort.candidates, guests_a_rank, inside) for fill in fills]


def _search(
    best: _Best,
    table: np.ndarray,
    cluster: ClusterSpec,
    target: np.ndarray,
    previous: np.ndarray | None,
    options: SearchOptions,
    guests_a_rank: int,
) -> None:
    """Try placements with at most so many guests a rank, until a layer is good or nothing helps."""
    effort = EFFORTS[options.effort]
    emphasis = np.ones(table.shape[:2], np.int64)
    few_nodes = cluster.num_nodes <= _FEW_NODES
    full_patience = _PATIENCE if few_nodes else 2
    patience = np.full(len(table), full_patience)
    for _ in range(effort.placements if guests_a_rank and few_nodes else 1):
        again = np.flatnonzero(best.unfinished() & (patience > 0))
        if not len(again):
            break
        part = table[again]
        placed = place(
            part * emphasis[again, :, None],
            cluster.num_nodes,
            cluster.gpus_per_node,
            previous_home=None if previous is None else previous[again],
            max_moves=options.max_moves,
            polish=guests_a_rank == 0 and options.effort == "full",
            sweeps=effort.sweeps,
        )
        for attempt in _attempts(options, guests_a_rank):
            open_ = np.flatnonzero((best.unfinished() & (patience > 0))[again])
            if not len(open_):
                break
            layer = again[open_]
            other = find_replicas(part[open_], placed[open_], cluster, target[layer], attempt)
            gained = best.keep(layer, placed[open_], other)
            patience[layer] = np.where(gained, full_patience, patience[layer] - 1)
        # Where that did not do, the next placement looks harder at the micro-batches that came out worst.
        emphasis[best.excess_LM > _GOOD_WORST] += 1


def _limit_guests(
    table: np.ndarray,
    home: np.ndarray,
    cluster: ClusterSpec,
    target: np.ndarray,
    attempt: Attempt,
    found: Replicas,
    max_kept: int,
) -> None:
    """Drop guests until no rank has more than `max_kept`; layers compete for them by their gain."""
    layer, rank, slot = np.nonzero(found.guests)
    order = np.lexsort((-found.gain[layer, rank, slot], rank))
    place_on_rank = np.empty(len(order), np.int64)
    first = np.flatnonzero(np.diff(rank[order], prepend=-1))
    place_on_rank[order] = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    keep = np.zeros_like(found.guests)
    kept = place_on_rank < max_kept
    keep[layer[kept], rank[kept], slot[kept]] = True
    fewer = np.flatnonzero((keep != found.guests).any((1, 2)))
    if len(fewer):
        old = Replicas(*(array[fewer] for array in vars(found).values()))
        new = keep_guests(table[fewer], home[fewer], cluster, target[fewer], attempt, old, keep[fewer])
        found.put(fewer, new, np.arange(len(fewer)))


def _score(excess_LM: np.ndarray) -> np.ndarray:
    return excess_LM.mean(1) + excess_LM.max(1) / 8
