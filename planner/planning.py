"""plan_batch: from a load table to a complete plan."""

from dataclasses import dataclass

import numpy as np

from .cluster import ClusterSpec
from .errors import InputError, ShapeError
from .loads import total_loads
from .matching import match_labels
from .placement import place
from .plan import BatchPlan, contiguous_home, rank_loads
from .plan_rules import check_home
from .replicas import Attempt, Replicas, find_replicas, keep_guests, target_load
from .replication import Effort


@dataclass(frozen=True)
class _Effort:
    """How hard to try, in units of work and never of time, so that the plan is the same everywhere.

    fills:      how much of a rank one guest may fill, in the order tried; layers that come out well are not tried again
    placements: how often a layer is placed; each time with more weight on the micro-batches that came out worst
    """

    fills: tuple[float, ...]
    placements: int
    sweeps: int
    rules: int
    steps: int
    slack: float
    candidates: int | None


_EFFORTS = {
    "fast": _Effort(fills=(0.5,), placements=1, sweeps=1, rules=1, steps=3, slack=8.0, candidates=4),
    "full": _Effort(
        fills=(0.5, 0.6, 0.4, 0.75, 0.9), placements=4, sweeps=12, rules=6, steps=8, slack=1.0, candidates=None
    ),
}
_GOOD_MEAN, _GOOD_WORST = 1.5e-3, 1e-2  # a layer this close to its target, in the mean and at worst, came out well
_DISPERSION = 1.5  # variance over mean of the experts' loads up to which routing is uniform; random draws have 1


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is to achieve, and at what price.

    balance:     max/mean over ranks at which a micro-batch is good enough; 1 is as even as possible
    effort:      "full", or "fast" for one pass without second attempts
    min_quota:   a replica is not worth its weights for fewer assignments than this
    max_moves:   with a previous placement, at most this many experts of a layer change their rank
    max_guests:  at most this many guests a rank over all layers
    """

    balance: float = 1.0
    effort: str = "full"
    min_quota: int = 1
    max_moves: int | None = None
    max_guests: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.balance < 1e6:
            raise InputError(f"balance is {self.balance}, but must be at least 1: it is max/mean over ranks")
        if self.effort not in _EFFORTS:
            raise InputError(f"effort is {self.effort!r}, but must be one of {sorted(_EFFORTS)}")
        for name, least in (("min_quota", 1), ("max_moves", 0), ("max_guests", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 1 << 32:
                raise InputError(f"{name} is {value}, but must be an integer from {least} to 2^32 - 1")


def plan_batch(
    loads: np.ndarray,
    cluster: ClusterSpec,
    *,
    previous_home: np.ndarray | None = None,
    model: str = "",
    options: PlanOptions | None = None,
) -> BatchPlan:
    """Plan one batch. Deterministic: the same loads give the same plan, bit for bit, on every machine.

    loads:         integer [L, M, E], or [L, M, R, E] by source rank: then nodes get experts that their own tokens use,
                   as far as that costs no balance and, with a previous placement, no move
    previous_home: [L, E], the placement that the batch before left the experts in
    model:         a name that the plan carries, so that it is not used for another model
    """
    table = total_loads(loads)
    options = options or PlanOptions()
    layers, micro_batches, experts = table.shape
    cluster.experts_per_rank(experts)
    if previous_home is None:
        home = contiguous_home(layers, experts, cluster.num_ranks)
    else:
        check_previous_home(previous_home, layers, experts, cluster.num_ranks)
        home = previous_home.astype(np.int32)
    found = Replicas.none(layers, micro_batches, cluster.num_ranks, cluster.replica_slots)
    as_is = rank_loads(table, home, found.replicas, found.quota).max(2)
    skewed = np.flatnonzero(~_even_enough(table, as_is, cluster.num_ranks, options.balance))
    if len(skewed):
        fixed = None if previous_home is None else home[skewed]
        wanted = _wanted_by_nodes(np.asarray(loads), cluster)
        home[skewed], better = _plan_layers(
            table[skewed], cluster, fixed, options, None if wanted is None else wanted[skewed]
        )
        found.put(skewed, better, np.arange(len(skewed)))
    return BatchPlan(
        home=home,
        replicas=found.replicas,
        quota=found.quota,
        guests=found.guests,
        gpus_per_node=cluster.gpus_per_node,
        model=model,
        loads=table,
    )


def check_previous_home(previous_home: np.ndarray, layers: int, experts: int, ranks: int) -> None:
    """A previous placement must fit this batch and be a placement."""
    if previous_home.shape != (layers, experts) or previous_home.dtype.kind not in "iu":
        raise ShapeError(
            f"previous_home is {previous_home.dtype} of shape {previous_home.shape}, but must be integer "
            f"[layers, experts] = {(layers, experts)}"
        )
    check_home(previous_home, ranks)


def _plan_layers(
    table: np.ndarray,
    cluster: ClusterSpec,
    previous: np.ndarray | None,
    options: PlanOptions,
    wanted_LNE: np.ndarray | None,
) -> tuple[np.ndarray, Replicas]:
    layers, _, experts = table.shape
    ranks, slots = cluster.num_ranks, cluster.replica_slots
    target = target_load(table, ranks, options.balance)
    guest_slots = min(1, slots) if cluster.guest_slots is None else cluster.guest_slots
    if cluster.num_nodes == 1 or options.max_guests == 0:
        guest_slots = 0
    effort = _EFFORTS[options.effort]
    inside = Effort(effort.rules, effort.steps, options.min_quota)
    attempts = [Attempt(fill, effort.slack, effort.candidates, guest_slots, inside) for fill in effort.fills]
    if guest_slots == 0:
        attempts = attempts[:1]
    home = np.zeros((layers, experts), np.int32)
    found = Replicas.none(layers, table.shape[1], ranks, slots)
    excess = np.full(table.shape[:2], np.inf)
    emphasis = np.ones(table.shape[:2], np.int64)
    for _ in range(effort.placements if guest_slots and cluster.num_nodes <= 8 else 1):
        again = np.flatnonzero(_needs_work(excess))
        if not len(again):
            break
        part = table[again]
        placed = place(
            part * emphasis[again, :, None],
            cluster.num_nodes,
            cluster.gpus_per_node,
            previous_home=None if previous is None else previous[again],
            max_moves=options.max_moves,
            polish=guest_slots == 0 and options.effort == "full",
            sweeps=effort.sweeps,
        )
        for attempt in attempts:
            open_ = np.flatnonzero(_needs_work(excess[again]))
            if not len(open_):
                break
            layer = again[open_]
            other = find_replicas(part[open_], placed[open_], cluster, target[layer], attempt)
            other_excess = _excess(part[open_], placed[open_], other, target[layer])
            chosen = np.flatnonzero(_score(other_excess) < _score(excess[layer]))
            found.put(layer[chosen], other, chosen)
            home[layer[chosen]] = placed[open_[chosen]]
            excess[layer[chosen]] = other_excess[chosen]
        # Where that did not do, the next placement looks harder at the micro-batches that came out worst.
        emphasis[excess > _GOOD_WORST] += 1
    if wanted_LNE is not None and previous is None:
        _bring_near(wanted_LNE, home, found, cluster)
    if guest_slots and previous is None:
        _spread_guests(home, found, cluster)
    if options.max_guests is not None and guest_slots:
        _limit_guests(table, home, cluster, target, attempts[0], found, options.max_guests)

    # Never worse than to leave experts where they are.
    stay = contiguous_home(layers, experts, ranks) if previous is None else previous
    ours = rank_loads(table, home, found.replicas, found.quota).max(2)
    theirs = rank_loads(table, stay, found.replicas[..., :0], found.quota[..., :0]).max(2)
    total = np.maximum(table.sum(2), 1)
    worse = np.flatnonzero((ours.sum(1) > theirs.sum(1)) | ((ours / total).sum(1) > (theirs / total).sum(1)))
    if len(worse):
        home[worse] = stay[worse]
        calm = Attempt(0.0, effort.slack, None, 0, inside)
        found.put(worse, find_replicas(table[worse], stay[worse], cluster, target[worse], calm), np.arange(len(worse)))
    return home, found


def _wanted_by_nodes(loads: np.ndarray, cluster: ClusterSpec) -> np.ndarray | None:
    """int64 [L, N, E]: the assignments of each node's own tokens, where the table says whose they are."""
    if loads.ndim == 3 or cluster.num_nodes == 1:
        return None
    if loads.shape[2] != cluster.num_ranks:
        raise ShapeError(f"loads has {loads.shape[2]} source ranks, but the cluster has {cluster.num_ranks} ranks")
    layers, micro_batches, _, experts = loads.shape
    by_node = loads.reshape(layers, micro_batches, cluster.num_nodes, -1, experts)
    return by_node.sum((1, 3), dtype=np.int64)


def _bring_near(wanted_LNE: np.ndarray, home: np.ndarray, found: Replicas, cluster: ClusterSpec) -> None:
    """Exchange nodes, layer by layer, so that the fewest assignments leave the node of their token."""
    layers, nodes, _ = wanted_LNE.shape
    hosted = (home[:, None] // cluster.gpus_per_node == np.arange(nodes)[:, None]).astype(np.int64)  # [L, N, E]
    label = match_labels(np.matmul(hosted, wanted_LNE.swapaxes(1, 2)))
    ranks = label[:, :, None] * cluster.gpus_per_node + np.arange(cluster.gpus_per_node)
    for layer in range(layers):
        _rename(home, found, layer, ranks[layer].reshape(-1))


def _rename(home: np.ndarray, found: Replicas, layer: int, new: np.ndarray) -> None:
    """Rank r of a layer becomes rank new[r]."""
    old = np.argsort(new)
    home[layer] = new[home[layer]]
    for array in (found.replicas, found.quota):
        array[layer] = array[layer][:, old]
    for array in (found.guests, found.gain):
        array[layer] = array[layer][old]


def _spread_guests(home: np.ndarray, found: Replicas, cluster: ClusterSpec) -> None:
    """Exchange ranks of a node, layer by layer, so that over all layers they hold about the same number of guests."""
    nodes, gpus = cluster.num_nodes, cluster.gpus_per_node
    base = np.arange(nodes)[:, None] * gpus
    held = np.zeros((nodes, gpus), np.int64)
    for layer, count in enumerate(found.guests.sum(2).reshape(-1, nodes, gpus)):
        emptiest = np.argsort(held, axis=1, kind="stable")
        fullest = np.argsort(-count, axis=1, kind="stable")
        new = np.empty((nodes, gpus), np.int64)
        np.put_along_axis(new, fullest, base + emptiest, 1)  # rank -> its new name
        _rename(home, found, layer, new.reshape(-1))
        np.put_along_axis(
            held, emptiest, np.take_along_axis(held, emptiest, 1) + np.take_along_axis(count, fullest, 1), 1
        )


def _limit_guests(
    table: np.ndarray,
    home: np.ndarray,
    cluster: ClusterSpec,
    target: np.ndarray,
    attempt: Attempt,
    found: Replicas,
    max_guests: int,
) -> None:
    """Drop guests until no rank has more than `max_guests` over all layers; layers compete for them by their gain."""
    layer, rank, slot = np.nonzero(found.guests)
    order = np.lexsort((-found.gain[layer, rank, slot], rank))
    place_on_rank = np.empty(len(order), np.int64)
    first = np.flatnonzero(np.diff(rank[order], prepend=-1))
    place_on_rank[order] = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    keep = np.zeros_like(found.guests)
    kept = place_on_rank < max_guests
    keep[layer[kept], rank[kept], slot[kept]] = True
    fewer = np.flatnonzero((keep != found.guests).any((1, 2)))
    if len(fewer):
        old = Replicas(*(array[fewer] for array in vars(found).values()))
        new = keep_guests(table[fewer], home[fewer], cluster, target[fewer], attempt, old, keep[fewer])
        found.put(fewer, new, np.arange(len(fewer)))


def _excess(table: np.ndarray, home: np.ndarray, found: Replicas, target: np.ndarray) -> np.ndarray:
    """By how much the busiest rank exceeds its target, relative to it, [L, M]."""
    busiest = rank_loads(table, home, found.replicas, found.quota).max(2)
    return np.maximum(busiest - target, 0) / np.maximum(target, 1)


def _needs_work(excess_LM: np.ndarray) -> np.ndarray:
    return (excess_LM.mean(1) > _GOOD_MEAN) | (excess_LM.max(1) > _GOOD_WORST)


def _score(excess_LM: np.ndarray) -> np.ndarray:
    return excess_LM.mean(1) + excess_LM.max(1) / 8


def _even_enough(table: np.ndarray, busiest_LM: np.ndarray, ranks: int, balance: float) -> np.ndarray:
    """bool [L]: layers that need no plan, since every micro-batch is good enough as it is, or since their routing is
    uniform: the experts' loads vary no more than if every assignment had been drawn at random."""
    good = (busiest_LM * ranks <= np.maximum(table.sum(2) * balance, ranks)).all(1)
    mean = np.maximum(table.mean(2, keepdims=True), 1e-9)
    dispersion = ((table - mean) ** 2 / mean).sum(2) / max(table.shape[2] - 1, 1)  # 1 for random draws
    return good | (dispersion.mean(1) <= _DISPERSION)
