"""Replicas of one (layer, micro-batch): weights to the hosts, gradients back to the owner.

Both sides read the transfers off the plan, so nothing is negotiated. A replica lives in the receive buffer of its push
until the layer is done; it never becomes a parameter, has no optimizer state and reaches no checkpoint.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .. import ops
from ..planner import BatchPlan
from .comm import Comm


@dataclass(frozen=True)
class ReplicaRoute:
    """What one rank sends and receives.

    `home_slots` int64 [n]: home slots pushed, ordered by host rank, then replica slot.
    `push_counts`, `pull_counts`: experts to and from each rank, length R.
    `weight_of_slot` int32 [E/R + S]: where each slot's weights are, in the home store followed by the arrivals (ordered
        by owner, then slot); 0 for an empty slot, which has no rows.
    """

    home_slots: np.ndarray
    push_counts: list[int]
    pull_counts: list[int]
    weight_of_slot: np.ndarray


def replica_route(plan: BatchPlan, layer: int, micro_batch: int, rank: int) -> ReplicaRoute | None:
    """The transfers of `rank`; None where no rank has a replica, and then the layer does nothing for them."""
    if not plan.has_replicas(layer, micro_batch):
        return None
    replicas = plan.replicas[layer, micro_batch]
    owner = np.where(replicas >= 0, plan.home[layer][replicas], -1)

    host, slot = np.nonzero(owner == rank)  # ordered by host, then slot
    home_experts = plan.home_experts(layer)[rank]
    home_slots = np.searchsorted(home_experts, replicas[host, slot])

    held = np.flatnonzero(owner[rank] >= 0)
    arrivals = held[np.argsort(owner[rank][held], kind="stable")]  # ordered by owner, then slot
    weight_of_slot = np.zeros(plan.experts_per_rank + plan.num_slots, np.int32)
    weight_of_slot[: plan.experts_per_rank] = np.arange(plan.experts_per_rank)
    weight_of_slot[plan.experts_per_rank + arrivals] = plan.experts_per_rank + np.arange(len(arrivals))
    return ReplicaRoute(
        home_slots=home_slots,
        push_counts=np.bincount(host, minlength=plan.num_ranks).tolist(),
        pull_counts=np.bincount(owner[rank][held], minlength=plan.num_ranks).tolist(),
        weight_of_slot=weight_of_slot,
    )


def push_weights(comm: Comm, route: ReplicaRoute, home_slots: Tensor, weight: Tensor, phase: str) -> Tensor:
    """Send this rank's hot experts out and receive the replicas that it hosts: [arrivals, ...] of `weight`'s dtype."""
    leaving = weight.detach().index_select(0, home_slots)
    return comm.exchange(leaving, route.push_counts, route.pull_counts, "replica_weights", phase)


def return_gradients(
    comm: Comm, route: ReplicaRoute, home_slots: Tensor, replica_grad: Tensor, home_grad: Tensor, phase: str
) -> None:
    """Send the replicas' fp32 gradients home and add them to `home_grad`, in place, in the order of the host ranks."""
    shards = comm.exchange(replica_grad, route.pull_counts, route.push_counts, "replica_gradients", phase)
    ops.replica_reduce(home_grad, shards, home_slots)
