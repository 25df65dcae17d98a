"""Replicas of one (layer, micro-batch): weights to the hosts, gradients back to the owner.

Both sides read the transfers off the plan, so nothing is negotiated. A replica lives in the receive buffer of its push
until the layer is done; it never becomes a parameter, has no optimizer state and reaches no checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...planner import BatchPlan
from ...weights import ExpertWeights, replica_store
from ..comm.collectives import Comm, Exchange


@dataclass(frozen=True)
class Transfers:
    """Experts that one rank sends to others' replica slots, and those that come to its own.

    `home_slots` int64 [n]: home slots sent, ordered by host rank, then replica slot.
    `push_counts`, `pull_counts`: experts to and from each rank, length R.
    `arrivals` int64: the replica slots of this rank that are filled, in the order in which they come (owner, slot).
    `anywhere`: whether any rank sends anything: where not, no rank does.
    """

    home_slots: np.ndarray
    push_counts: list[int]
    pull_counts: list[int]
    arrivals: np.ndarray
    anywhere: bool


def transfers(plan: BatchPlan, layer: int, replicas_RS: np.ndarray, rank: int) -> Transfers:
    """What fills these replica slots (-1: none), seen from `rank`."""
    owner = np.where(replicas_RS >= 0, plan.home[layer][replicas_RS], -1)
    host, slot = np.nonzero(owner == rank)  # ordered by host, then slot
    held = np.flatnonzero(owner[rank] >= 0)
    return Transfers(
        home_slots=np.searchsorted(plan.home_experts(layer)[rank], replicas_RS[host, slot]),
        push_counts=np.bincount(host, minlength=plan.num_ranks).tolist(),
        pull_counts=np.bincount(owner[rank][held], minlength=plan.num_ranks).tolist(),
        arrivals=held[np.argsort(owner[rank][held], kind="stable")],
        anywhere=bool((owner >= 0).any()),
    )


@dataclass(frozen=True)
class ReplicaRoute:
    """The replicas of one (layer, micro-batch) on one rank.

    `pushed`: fetched for this micro-batch. `kept`: how many replicas of this rank are kept for the whole batch.
    `weight_of_slot` int32 [E/R + S]: where each slot's weights are: the home store, then what was pushed, then what is
        kept; 0 for an empty slot, which has no rows.
    """

    pushed: Transfers
    kept: int
    weight_of_slot: np.ndarray


def replica_route(
    plan: BatchPlan, layer: int, micro_batch: int, rank: int, kept_RS: np.ndarray, kept: Transfers | None
) -> ReplicaRoute | None:
    """The replicas of `rank`; None where no rank has one, and then the layer does nothing for them.

    Args:
        kept_RS: bool, which slots hold a kept replica. kept: the transfers that brought those.
    """
    if not plan.has_replicas(layer, micro_batch):
        return None
    pushed = transfers(plan, layer, np.where(kept_RS, -1, plan.replicas[layer, micro_batch]), rank)
    stay = kept.arrivals if kept is not None else np.zeros(0, np.int64)
    weight_of_slot = np.zeros(plan.experts_per_rank + plan.num_slots, np.int32)
    weight_of_slot[: plan.experts_per_rank] = np.arange(plan.experts_per_rank)
    filled = np.concatenate([pushed.arrivals, stay])
    weight_of_slot[plan.experts_per_rank + filled] = plan.experts_per_rank + np.arange(len(filled))
    return ReplicaRoute(pushed, len(stay), weight_of_slot)


class Push:
    """Replica weights on their way to this rank, begun a layer ahead."""

    def __init__(self, comm: Comm, route: ReplicaRoute, home: ExpertWeights, kept: ExpertWeights | None, where: str):
        self._exchanges: list[Exchange] = []
        self._route, self._kept = route, kept
        pushed = route.pushed
        arrivals = len(pushed.arrivals)

        def begin(weight: Tensor) -> Tensor:
            store = replica_store(weight.detach(), arrivals + route.kept)
            if pushed.anywhere:
                slots = torch.from_numpy(pushed.home_slots).to(weight.device)
                leaving = weight.detach().index_select(0, slots)
                counts = pushed.push_counts, pushed.pull_counts
                phase = f"replica weights of {where}"
                self._exchanges.append(comm.start(leaving, *counts, "replica_weights", phase, store[:arrivals]))
            return store

        self._stores = home.map(begin)

    def wait(self) -> ExpertWeights:
        """[pushed + kept, ...] of every weight."""
        for exchange in self._exchanges:
            exchange.wait()
        if self._route.kept and self._kept is not None:
            arrivals = len(self._route.pushed.arrivals)
            for store, kept in zip(self._stores.tensors(), self._kept.tensors(), strict=True):
                store[arrivals:].copy_(kept)
        return self._stores


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
        """Begin a push unless it is under way."""
        key = (layer, micro_batch, backward)
        if route is None or key in self._begun:
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
        if backward and not hold and (layer, micro_batch) in self._held:
            return self._held.pop((layer, micro_batch))
        self.start(layer, micro_batch, backward, route)
        replicas = self._begun.pop((layer, micro_batch, backward)).wait()
        if hold:
            self._held[layer, micro_batch] = replicas
        return replicas

    def finish(self) -> None:
        """Wait for what was begun in vain; let go of everything."""
        for push in self._begun.values():
            push.wait()
        self._begun.clear()
        self.close()

    def close(self) -> None:
        """Let go of what has arrived, also where the batch failed; what is still on its way is still written to."""
        self._held.clear()


class GradientReturn:
    """Replicas' fp32 gradients on their way to the owners, who add them up in the order of the host ranks."""

    def __init__(
        self,
        comm: Comm,
        moved: Transfers,
        replica_grad: ExpertWeights,
        home_grad: ExpertWeights,
        phase: str,
        kind: str = "replica_gradients",
    ):
        self._exchanges: list[tuple[Exchange, Tensor]] = []
        self._home_slots = moved.home_slots
        counts = moved.pull_counts, moved.push_counts
        for shard, owner in zip(replica_grad.tensors(), home_grad.tensors(), strict=True):
            self._exchanges.append((comm.start(shard, *counts, kind, phase), owner))

    def finish(self) -> None:
        """Add them into the owner's buffers, in place."""
        for exchange, owner in self._exchanges:
            shards = exchange.wait()
            ops.replica_reduce(owner, shards, torch.from_numpy(self._home_slots).to(owner.device))
