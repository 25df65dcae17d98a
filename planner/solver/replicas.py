"""Guests and replicas of a placed batch, as the arrays of a plan."""

from dataclasses import dataclass

import numpy as np

from ..cluster import ClusterSpec
from .guests import Guests, NodeProblem, carry, choose_guests, running_index, seat
from .replication import Effort, Groups, Moves, replicate


@dataclass(frozen=True)
class Attempt:
    """One way to go about it. guest_fill, slack, candidates: see NodeProblem; guests_a_rank: at most."""

    guest_fill: float
    slack: float
    candidates: int | None
    guests_a_rank: int
    effort: Effort


@dataclass(frozen=True, eq=False)
class Replicas:
    """The arrays of a plan beside `home`, for some layers: replicas and quota [L, M, R, S], guests [L, R, S]; and
    gain [L, R, S], how many assignments each guest could move over the batch when it was chosen."""

    replicas: np.ndarray
    quota: np.ndarray
    guests: np.ndarray
    gain: np.ndarray

    def put(self, layers: np.ndarray, other: "Replicas", chosen: np.ndarray) -> None:
        """Take over `other`'s layers `chosen`, which are our `layers`."""
        for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            ours[layers] = theirs[chosen]

    @staticmethod
    def none(layers: int, micro_batches: int, ranks: int, slots: int) -> "Replicas":
        shape = (layers, micro_batches, ranks, slots)
        flat = (layers, ranks, slots)
        return Replicas(
            np.full(shape, -1, np.int32), np.zeros(shape, np.int32), np.zeros(flat, np.bool_), np.zeros(flat, np.int64)
        )


def target_load(table_LME: np.ndarray, ranks: int, balance: float) -> np.ndarray:
    """int64 [L, M]: what the busiest rank may have; the mean, rounded up, where `balance` is 1."""
    total = table_LME.sum(2)
    return np.maximum(-(-total // ranks), np.floor(total * (balance / ranks)).astype(np.int64))


def find_replicas(
    table_LME: np.ndarray, home_LE: np.ndarray, cluster: ClusterSpec, target_LM: np.ndarray, attempt: Attempt
) -> Replicas:
    """Guests and replicas that bring every rank to its target, or as low as they get it."""
    problem = _problem(table_LME, home_LE, cluster, target_LM, attempt)
    guests, taken = choose_guests(problem, attempt.guests_a_rank * cluster.gpus_per_node)
    return _assemble(problem, home_LE, cluster, attempt, guests, taken)


def keep_guests(
    table_LME: np.ndarray,
    home_LE: np.ndarray,
    cluster: ClusterSpec,
    target_LM: np.ndarray,
    attempt: Attempt,
    before: Replicas,
    keep_LRS: np.ndarray,
) -> Replicas:
    """Replicas for the guests of `before` that are in `keep_LRS`, and no others."""
    problem = _problem(table_LME, home_LE, cluster, target_LM, attempt)
    layer, rank, slot = np.nonzero(keep_LRS)
    expert, gain = before.replicas[layer, 0, rank, slot].astype(np.int64), before.gain[layer, rank, slot]
    donor = home_LE[layer, expert] // cluster.gpus_per_node
    guests = Guests(layer, expert, donor, rank // cluster.gpus_per_node, gain)
    best_first = np.lexsort((-gain, layer))
    guests = guests.where(best_first)
    return _assemble(problem, home_LE, cluster, attempt, guests, carry(problem, guests), rank[best_first])


def _problem(
    table_LME: np.ndarray, home_LE: np.ndarray, cluster: ClusterSpec, target_LM: np.ndarray, attempt: Attempt
) -> NodeProblem:
    node_LE = home_LE // cluster.gpus_per_node
    return NodeProblem(
        table_LME,
        node_LE,
        target_LM,
        cluster.num_nodes,
        cluster.gpus_per_node,
        attempt.guest_fill,
        attempt.slack,
        attempt.candidates,
    )


def _assemble(
    problem: NodeProblem,
    home_LE: np.ndarray,
    cluster: ClusterSpec,
    attempt: Attempt,
    guests: Guests,
    taken: np.ndarray,
    rank: np.ndarray | None = None,
) -> Replicas:
    layers, micro_batches, experts = problem.table_LME.shape
    ranks, gpus, slots = cluster.num_ranks, cluster.gpus_per_node, cluster.replica_slots
    taken = np.where(taken < attempt.effort.least, 0, taken)
    if rank is None:  # guests that are never worth their weights
        used = np.asarray(taken.any(1))
        guests, taken = guests.where(used), taken[used]
    rest = problem.table_LME.copy()
    np.subtract.at(rest.swapaxes(1, 2), (guests.layer, guests.expert), taken)
    held = np.argsort(home_LE, axis=1, kind="stable").reshape(layers, ranks, -1)  # home experts by rank
    at_home = np.take_along_axis(rest, held.reshape(layers, 1, experts), 2)
    at_home = at_home.reshape(layers, micro_batches, ranks, experts // ranks)
    load = at_home.sum(3)
    if rank is None:
        rank = seat(guests, taken, load, problem, attempt.guests_a_rank)
    else:
        np.add.at(load.swapaxes(1, 2), (guests.layer, rank), taken)
    if (rank < 0).any():
        seated = rank >= 0
        return _assemble(problem, home_LE, cluster, attempt, guests.where(seated), taken[seated])

    out = Replicas.none(layers, micro_batches, ranks, slots)
    slot = running_index(guests.layer * ranks + rank)
    out.guests[guests.layer, rank, slot] = True
    out.gain[guests.layer, rank, slot] = guests.gain
    out.replicas[guests.layer, :, rank, slot] = guests.expert[:, None]
    out.quota[guests.layer, :, rank, slot] = taken

    free = np.repeat(slots - out.guests.sum(2)[:, None], micro_batches, 1)
    groups = Groups(  # X = (layer, micro-batch, node)
        load_GX=np.ascontiguousarray(load.reshape(-1, gpus).T),
        rest_CGX=np.ascontiguousarray(at_home.reshape(-1, gpus, experts // ranks).transpose(2, 1, 0)),
        free_GX=np.ascontiguousarray(free.reshape(-1, gpus).T),
    )
    micro_batch = np.repeat(np.arange(layers * micro_batches), cluster.num_nodes)
    target = problem.capacity_LM.reshape(-1)[micro_batch]
    moves = replicate(groups, target, micro_batch, attempt.effort)
    _write(moves, held, out, gpus)
    return out


def _write(moves: Moves, held_LRC: np.ndarray, out: Replicas, gpus: int) -> None:
    """Put transfers into the slots after those of guests."""
    spot = moves.group * gpus + moves.host  # (layer, micro-batch, rank), flat
    layer, micro_batch, rank = np.unravel_index(spot, out.replicas.shape[:3])
    slot = running_index(spot) + out.guests.sum(2)[layer, rank]
    donor = rank // gpus * gpus + moves.donor
    out.replicas[layer, micro_batch, rank, slot] = held_LRC[layer, donor, moves.index]
    out.quota[layer, micro_batch, rank, slot] = moves.amount
