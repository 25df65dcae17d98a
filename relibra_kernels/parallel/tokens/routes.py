"""Where the tokens of one rank go, for every layer of a micro-batch: numpy, worked out before it runs.

A token travels to a rank once, however many of its experts live there. What travels in a layer is the row and its gate
weights; which slots a row visits follows from the recorded routing, so it is sent ahead, once a micro-batch.
"""

from dataclasses import dataclass

import numpy as np

from ...planner import BatchPlan
from ...planner.splits import destinations, split_of_source


@dataclass(frozen=True)
class SendRoute:
    """The rows one rank sends in one (layer, micro-batch), ordered by destination rank, then token.

    `assignment_of` int32 [n]: the first of the token's assignments that goes to that rank, as t * K + k.
    `slots` int16 [n, K]: slot on the destination of each assignment of the token, -1 where it goes to another rank.
    `counts` int64 [R]: rows to each rank.
    """

    assignment_of: np.ndarray
    slots: np.ndarray
    counts: np.ndarray


def slot_table(plan: BatchPlan, layer: int, micro_batch: int) -> np.ndarray:
    """Slot of each expert on each rank, int16 [E, R]; -1 where the rank does not hold it.

    Home slots 0 .. E/R - 1 in ascending expert order, then the replica slots.
    """
    table = np.full((plan.num_experts, plan.num_ranks), -1, np.int16)
    home_experts = plan.home_experts(layer)
    ranks = np.arange(plan.num_ranks)[:, None]
    table[home_experts, ranks] = np.arange(plan.experts_per_rank)
    replicas = plan.replicas[layer, micro_batch]
    rank, slot = np.nonzero(replicas >= 0)
    table[replicas[rank, slot], rank] = plan.experts_per_rank + slot
    return table


def send_routes(
    expert_ids_TLK: np.ndarray, plan: BatchPlan, loads_LMRE: np.ndarray, micro_batch: int, rank: int
) -> list[SendRoute]:
    """The routes of `rank` in one micro-batch, a layer each; rows of -1 go nowhere."""
    return [
        _send_route(np.ascontiguousarray(expert_ids_TLK[:, layer]), plan, loads_LMRE, layer, micro_batch, rank)
        for layer in range(plan.num_layers)
    ]


def _send_route(
    expert_ids_TK: np.ndarray, plan: BatchPlan, loads_LMRE: np.ndarray, layer: int, micro_batch: int, rank: int
) -> SendRoute:
    tokens, top_k = expert_ids_TK.shape
    if plan.has_replicas(layer, micro_batch):
        dest_TK = destinations(expert_ids_TK, split_of_source(plan, loads_LMRE, layer, micro_batch, rank))
    else:
        dest_TK = np.where(expert_ids_TK >= 0, plan.home[layer][expert_ids_TK], -1)

    visits = np.zeros((plan.num_ranks, tokens), bool)
    token, k = np.nonzero(dest_TK >= 0)
    visits[dest_TK[token, k], token] = True
    dest, token = np.nonzero(visits)  # sorted by destination, then token

    here_nK = dest_TK[token] == dest[:, None]
    slots = slot_table(plan, layer, micro_batch)[expert_ids_TK[token], dest[:, None]]
    return SendRoute(
        assignment_of=(token * top_k + here_nK.argmax(1)).astype(np.int32),
        slots=np.where(here_nK, slots, np.int16(-1)),
        counts=visits.sum(1),
    )
