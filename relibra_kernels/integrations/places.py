"""A plan as numbers of places: who computes what, for dispatchers that number experts by where they are.

Rank r has the places `r * slots` to `(r + 1) * slots - 1`: its home slots in ascending expert order,
then its replica slots.
"""

import numpy as np

from ..planner import BatchPlan, destinations, split_of_source


def expert_of_place(plan: BatchPlan, layer: int, micro_batch: int | None = None) -> np.ndarray:
    """int64 [R, slots]: the logical expert whose weights belong in each place, -1 where it is empty.

    Without a micro-batch the places are the homes, [R, E/R]: where the parameters and their optimizer state are. With
    one, the replica slots follow: [R, E/R + S]. Flattened, it is the order of the dispatcher's columns.
    """
    home = plan.home_experts(layer).astype(np.int64)
    if micro_batch is None:
        return home
    return np.concatenate([home, plan.replicas[layer, micro_batch].astype(np.int64)], 1)


def place_of_expert(plan: BatchPlan, layer: int) -> np.ndarray:
    """int64 [E]: the column of each logical expert among the homes; the permutation for checkpoints and routers."""
    order = expert_of_place(plan, layer).reshape(-1)
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


def places_of_assignments(
    plan: BatchPlan, loads_LMRE: np.ndarray, expert_ids_TK: np.ndarray, layer: int, micro_batch: int, rank: int
) -> np.ndarray:
    """int64 [T, K]: the place that computes each of a rank's recorded assignments; -1 where it was not recorded.

    Args:
        loads_LMRE: the load table by source rank that the plan was made for.
        expert_ids_TK: the recorded routing of the rank's tokens in this layer and micro-batch.
    """
    ids = np.asarray(expert_ids_TK)
    rank_TK = destinations(ids, split_of_source(plan, loads_LMRE, layer, micro_batch, rank))
    places = expert_of_place(plan, layer, micro_batch)
    host, slot = np.nonzero(places >= 0)
    place_ER = np.full((plan.num_experts, len(places)), -1, np.int64)
    place_ER[places[host, slot], host] = host * places.shape[1] + slot
    return np.where(ids >= 0, place_ER[ids, rank_TK], -1)
