"""Fetched replicas of one (layer, micro-batch): weights to the hosts, gradients back to who sent them.

Both sides read the transfers off the plan, so nothing is negotiated. A replica comes from its home, or from a rank of
its node that keeps it. It lives in the receive buffer of its push until the layer is done; it never becomes a
parameter, has no optimizer state and reaches no checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...planner import BatchPlan
from ...weights import ExpertWeights
from ..comm.collectives import Comm, Exchange
from ..comm.devices import upload
from . import blob


@dataclass(frozen=True)
class Transfers:
    """Experts that one rank sends to others' replica slots, and those that come to its own.

    `from_home` int64 [n]: the home slot of each expert sent, ordered by host rank, then replica slot; -1 where it is
        sent from `from_kept`, its place among the replicas that this rank keeps, else -1. On the device.
    `push_counts`, `pull_counts`: experts to and from each rank, length R.
    `arrivals` int64: the replica slots of this rank that are filled, in the order in which they come (source, slot).
    `anywhere`: whether any rank sends anything: where not, no rank does.
    `sends_kept`: whether this rank sends any of its kept replicas.
    """

    from_home: Tensor
    from_kept: Tensor
    push_counts: list[int]
    pull_counts: list[int]
    arrivals: np.ndarray
    anywhere: bool
    sends_kept: bool

    def pack(self, home: ExpertWeights, kept: ExpertWeights | None) -> Tensor:
        """What this rank sends, [n, elements of an expert]."""
        out = blob.pack(home, self.from_home.clamp(min=0))
        if self.sends_kept:
            assert kept is not None
            others = blob.pack(kept, self.from_kept.clamp(min=0))
            out = torch.where((self.from_home >= 0)[:, None], out, others)
        return out


def transfers(
    experts_RS: np.ndarray,
    source_RS: np.ndarray,
    home_slot_E: np.ndarray,
    kept_E: np.ndarray,
    rank: int,
    device: torch.device,
) -> Transfers:
    """What fills replica slots, seen from `rank`.

    Args:
        experts_RS: int, the expert that comes to each slot. source_RS: int, the rank that sends it; -1: no one does.
        home_slot_E: int [E], the home slot of each expert on this rank, -1 elsewhere.
        kept_E: int [E], the place of each expert among those that this rank keeps, -1 elsewhere.
    """
    host, slot = np.nonzero(source_RS == rank)  # ordered by host, then slot
    held = np.flatnonzero(source_RS[rank] >= 0)
    ranks = len(source_RS)
    sent = experts_RS[host, slot]
    from_home = home_slot_E[sent].astype(np.int64)
    from_kept = np.where(from_home < 0, kept_E[sent], -1).astype(np.int64)
    return Transfers(
        from_home=upload(from_home, device),
        from_kept=upload(from_kept, device),
        push_counts=np.bincount(host, minlength=ranks).tolist(),
        pull_counts=np.bincount(source_RS[rank][held], minlength=ranks).tolist(),
        arrivals=held[np.argsort(source_RS[rank][held], kind="stable")],
        anywhere=bool((source_RS >= 0).any()),
        sends_kept=bool((from_kept >= 0).any()),
    )


def home_slot_of_expert(plan: BatchPlan, layer: int, rank: int) -> np.ndarray:
    """int64 [E]: the home slot of each expert on `rank`, -1 for those of other ranks."""
    slots = np.full(plan.num_experts, -1, np.int64)
    mine = np.flatnonzero(plan.home[layer] == rank)
    slots[mine] = np.arange(len(mine))
    return slots


@dataclass(frozen=True)
class ReplicaRoute:
    """The replicas of one (layer, micro-batch) on one rank.

    `pushed`: fetched for this micro-batch. `kept`: how many replicas of this rank are kept for the whole batch.
    `weight_of_slot` int32 [home slots + S], on the device: where each slot's weights are: the home store, then what was
        pushed, then what is kept; 0 for an empty slot, which has no rows.
    """

    pushed: Transfers
    kept: int
    weight_of_slot: Tensor

    @property
    def only_kept(self) -> bool:
        """Whether nothing comes to this rank: then its replicas are computed with where they are kept, uncopied."""
        return not len(self.pushed.arrivals)


class ReplicaRoutes:
    """The routes of one batch on one rank, made when they are asked for.

    Args:
        sources_LMRS: int32, the rank that sends each fetched replica, -1 for empty and kept slots.
        kept_slots: of a layer, int64, the replica slots of `rank` that are kept, in the order of their store.
    """

    def __init__(
        self,
        plan: BatchPlan,
        rank: int,
        sources_LMRS: np.ndarray,
        kept_slots: Callable[[int], np.ndarray],
        device: torch.device,
    ):
        self._plan, self._rank, self._device = plan, rank, device
        self._sources, self._kept_slots = sources_LMRS, kept_slots
        self._has_replicas = _any_of_ranks(plan.replicas >= 0)
        self._fetches = _any_of_ranks(sources_LMRS >= 0)
        self._made: dict[tuple[int, int], ReplicaRoute] = {}

    def of(self, layer: int, micro_batch: int) -> ReplicaRoute | None:
        """None where no rank has a replica, and then the layer does nothing for them; and outside of the model."""
        if not 0 <= layer < self._plan.num_layers or not self._has_replicas[layer, micro_batch]:
            return None
        key = layer, micro_batch if self._fetches[layer, micro_batch] else -1  # kept ones are the same in all
        if key not in self._made:
            self._made[key] = self._make(layer, micro_batch)
        return self._made[key]

    def _make(self, layer: int, micro_batch: int) -> ReplicaRoute:
        plan, rank, kept_slots = self._plan, self._rank, self._kept_slots(layer)
        experts_RS, source_RS = plan.replicas[layer, micro_batch], self._sources[layer, micro_batch]
        kept_E = np.full(plan.num_experts, -1, np.int64)
        kept_E[experts_RS[rank, kept_slots]] = np.arange(len(kept_slots))
        home_slot_E = home_slot_of_expert(plan, layer, rank)
        pushed = transfers(experts_RS, source_RS, home_slot_E, kept_E, rank, self._device)
        weight_of_slot = np.zeros(plan.home_slots + plan.num_slots, np.int32)
        weight_of_slot[: plan.home_slots] = np.arange(plan.home_slots)
        filled = np.concatenate([pushed.arrivals, kept_slots])
        weight_of_slot[plan.home_slots + filled] = plan.home_slots + np.arange(len(filled))
        return ReplicaRoute(pushed, len(kept_slots), upload(weight_of_slot, self._device))


def _any_of_ranks(slots_LMRS: np.ndarray) -> np.ndarray:
    """bool [L, M]"""
    return np.asarray(slots_LMRS.any((2, 3)))


class Push:
    """Replica weights on their way to this rank, begun a layer ahead. Collective."""

    def __init__(self, comm: Comm, route: ReplicaRoute, home: ExpertWeights, kept: ExpertWeights | None, where: str):
        self._route, self._home, self._kept = route, home, kept
        counts = route.pushed.push_counts, route.pushed.pull_counts
        leaving = route.pushed.pack(home, kept)
        self._exchange = comm.start(leaving, *counts, "replica_weights", f"replica weights of {where}")

    def wait(self) -> ExpertWeights:
        """[pushed + kept, ...] of every weight."""
        arrived = self._exchange.wait()
        if self._route.only_kept and self._kept is not None:
            return self._kept
        stores = blob.unpack(arrived, self._home.map(torch.Tensor.detach), self._route.kept)
        if self._route.kept and self._kept is not None:
            for store, kept in zip(stores.tensors(), self._kept.tensors(), strict=True):
                store[len(arrived) :].copy_(kept)
        return stores


class ReplicaPushes:
    """The pushes of one batch, each begun one layer before it is needed.

    Args:
        comm: a group of its own, so that weights do not stand in the way of tokens.
        weights_of: the home weights of a layer. kept_of: those of its kept replicas on this rank.
    """

    def __init__(
        self,
        comm: Comm,
        weights_of: Callable[[int], ExpertWeights],
        kept_of: Callable[[int], ExpertWeights | None],
    ):
        self.comm = comm
        self._weights_of, self._kept_of = weights_of, kept_of
        self._begun: dict[tuple[int, int, bool], Push] = {}
        self._held: dict[tuple[int, int], ExpertWeights] = {}

    def start(self, layer: int, micro_batch: int, backward: bool, route: ReplicaRoute | None) -> None:
        """Begin a push unless it is under way, or no rank fetches a replica."""
        key = (layer, micro_batch, backward)
        if route is None or not route.pushed.anywhere or key in self._begun:
            return
        if backward and (layer, micro_batch) in self._held:
            return
        where = f"layer {layer}, micro-batch {micro_batch}"
        self._begun[key] = Push(self.comm, route, self._weights_of(layer), self._kept_of(layer), where)

    def take(
        self, layer: int, micro_batch: int, backward: bool, route: ReplicaRoute | None, hold: bool = False
    ) -> ExpertWeights | None:
        """The replicas on this rank, or None where the layer has none anywhere.

        Args:
            hold: keep them for the backward that follows: what a recomputed forward fetched.
        """
        if route is None:
            return None
        if not route.pushed.anywhere:
            return self._kept_of(layer)
        if backward and not hold and (layer, micro_batch) in self._held:
            return self._held.pop((layer, micro_batch))
        self.start(layer, micro_batch, backward, route)
        replicas = self._begun.pop((layer, micro_batch, backward)).wait()
        if hold:
            self._held[layer, micro_batch] = replicas
        return replicas

    def finish(self) -> None:
        """Wait for pushes that nobody took, and drop all that is held."""
        for push in self._begun.values():
            push.wait()
        self._begun.clear()
        self.close()

    def close(self) -> None:
        """Drop what has arrived, also where the batch failed. A push that is still under way keeps its buffer."""
        self._held.clear()


class GradientReturn:
    """Replicas' fp32 gradients on their way to the ranks that sent their weights, as one blob.

    They are added up in the order of the host ranks: into the owner's gradients, or into those of a kept replica, which
    go home when the batch closes.
    """

    def __init__(
        self, comm: Comm, moved: Transfers, replica_grad: ExpertWeights, phase: str, kind: str = "replica_gradients"
    ):
        self._moved, self._like = moved, replica_grad
        self._exchange: Exchange | None = None
        if replica_grad.tensors():
            counts = moved.pull_counts, moved.push_counts
            self._exchange = comm.start(blob.pack(replica_grad), *counts, kind, phase)

    def finish(self, home_grad: ExpertWeights | None, kept_grad: ExpertWeights | None = None) -> None:
        """Add them into these buffers, in place.

        Args: home_grad: of the homes. kept_grad: of this rank's kept replicas, where it sends such. None: none do.
        """
        if self._exchange is None:
            return
        shards = blob.unpack(self._exchange.wait(), self._like)
        for grads, index in ((home_grad, self._moved.from_home), (kept_grad, self._moved.from_kept)):
            if grads is not None:
                for shard, owner in zip(shards.tensors(), grads.tensors(), strict=True):
                    ops.replica_reduce(owner, shard, index)
