"""Which source rank's assignments go to which host of an expert.

Every rank derives the same integers from the plan: no randomness, nothing in floating point. An expert is at most once
on a rank, so the rank decides the slot.
"""

import numpy as np

from .errors import PlanError, ShapeError
from .plan import BatchPlan


def split_of_source(plan: BatchPlan, loads_LMRE: np.ndarray, layer: int, micro_batch: int, source: int) -> np.ndarray:
    """int32 [E, R]: how many of a source rank's assignments of an expert go to each rank.

    Sums over ranks are what the source has. Summed over all sources, a host gets its quota, and the home takes what its
    replicas leave. A host is given assignments of its own rank first, then of its own node, then of the others.
    Within the last two groups every source's assignments are divided over the hosts in proportion to what each host
    can still take; fractions are settled by largest remainder.

    Raises: ShapeError where the loads are of other ranks or experts than the plan; PlanError where the plan's replicas
    take more than these loads have.
    """
    if loads_LMRE.ndim != 4 or loads_LMRE.shape[2:] != (plan.num_ranks, plan.num_experts):
        raise ShapeError(
            f"loads has shape {loads_LMRE.shape}, but must be [layers, micro-batches, {plan.num_ranks} source ranks, "
            f"{plan.num_experts}]"
        )
    home, quota = plan.home[layer], plan.quota[layer, micro_batch]
    split = np.zeros((plan.num_experts, plan.num_ranks), np.int32)
    split[np.arange(plan.num_experts), home] = loads_LMRE[layer, micro_batch, source]
    rank, slot = np.nonzero(quota)
    expert, row = np.unique(plan.replicas[layer, micro_batch, rank, slot], return_inverse=True)
    take_XR = np.zeros((len(expert), plan.num_ranks), np.int64)
    take_XR[row, rank] = quota[rank, slot]
    have_XS = loads_LMRE[layer, micro_batch].T[expert].astype(np.int64)
    at_home = have_XS.sum(1) - take_XR.sum(1)
    if (at_home < 0).any():
        raise PlanError(
            f"the replicas of expert {expert[at_home.argmin()]} in layer {layer}, micro-batch {micro_batch} take more "
            "assignments than these loads have"
        )
    take_XR[np.arange(len(expert)), home[expert]] = at_home
    split[expert] = _split(have_XS, take_XR, plan.gpus_per_node, source)
    return split


def destinations(expert_ids_TK: np.ndarray, split_of_source_ER: np.ndarray) -> np.ndarray:
    """int32 [T, K]: the rank that computes each assignment of one source; -1 where it was not recorded.

    An expert's assignments are counted in token order, and within a token by k. The j-th (from 0) goes to the first
    rank at which the running sum of `split_of_source_ER[expert]` exceeds j.
    """
    ids = np.asarray(expert_ids_TK)
    split = np.asarray(split_of_source_ER, np.int64)
    flat = ids.reshape(-1).astype(np.int64)
    known = np.flatnonzero(flat >= 0)
    count = np.bincount(flat[known], minlength=len(split))
    if len(count) != len(split) or (count != split.sum(1)).any():
        raise ShapeError(
            "expert_ids do not fit the split: they choose other experts, or another number of times, than its loads say"
        )
    # Sorted by expert (stably), occurrences lie as the split does when it is read expert by expert, rank by rank.
    order = np.argsort(flat[known], kind="stable")
    rank_of_sorted = np.repeat(np.tile(np.arange(split.shape[1], dtype=np.int32), len(split)), split.reshape(-1))
    out = np.full(flat.shape, -1, np.int32)
    out[known[order]] = rank_of_sorted
    return out.reshape(ids.shape)


def _split(have_XS: np.ndarray, take_XR: np.ndarray, gpus_per_node: int, source: int) -> np.ndarray:
    """int64 [X, R]: the source's row of a split with row sums have_XS and column sums take_XR, of each expert X."""
    same_rank = np.minimum(have_XS, take_XR)
    have, take = have_XS - same_rank, take_XR - same_rank
    split = np.zeros_like(take)
    split[:, source] = same_rank[:, source]

    # Within a node, all nodes at once: [X * N, G]. What the node's hosts cannot take waits for the second round.
    near = _by_largest_remainder(have.reshape(-1, gpus_per_node), take.reshape(-1, gpus_per_node))
    have -= near.sum(2).reshape(have.shape)
    take -= near.sum(1).reshape(take.shape)
    node = source // gpus_per_node * gpus_per_node
    split[:, node : node + gpus_per_node] += near.reshape(*have.shape, gpus_per_node)[:, source]

    # The rest, over the few ranks that are hosts, in rank order.
    hosts = np.argsort(take == 0, axis=1, kind="stable")[:, : int((take > 0).sum(1).max(initial=0))]
    far = _by_largest_remainder(have, np.take_along_axis(take, hosts, 1))[:, source]
    split[np.arange(len(split))[:, None], hosts] += far
    return split


def _by_largest_remainder(have_BS: np.ndarray, take_BH: np.ndarray) -> np.ndarray:
    """int64 [B, S, H]: sources in turn spread what they have over hosts in proportion to what these still take.

    Where the hosts together take less than the sources have, later sources keep what is left.
    """
    out = np.zeros((*have_BS.shape, take_BH.shape[1]), np.int64)
    take = take_BH.copy()
    left = take.sum(1)
    for source in np.flatnonzero((have_BS > 0).any(0)):
        amount = np.minimum(have_BS[:, source], left)
        busy = np.flatnonzero(amount)
        if not len(busy):
            continue
        cap, n = take[busy], amount[busy]
        whole, rest = np.divmod(n[:, None] * cap, left[busy, None])
        missing = n - whole.sum(1)  # fewer than hosts with a remainder, each of which has room for one more
        rank_of = np.argsort(np.argsort(-rest, axis=1, kind="stable"), axis=1, kind="stable")
        whole += rank_of < missing[:, None]
        out[busy, source] = whole
        take[busy] = cap - whole
        left[busy] -= n
    return out
