"""The rules that every plan obeys, each with the place where it is broken."""

import numpy as np

from .errors import PlanError


def check_home(home: np.ndarray, num_ranks: int) -> None:
    """Every rank is home to floor(E / R) or ceil(E / R) experts of every layer, and to one at least."""
    layers, experts = home.shape
    if not 1 <= num_ranks <= experts:
        raise PlanError(f"{experts} experts are for 1 to {experts} ranks, but there are {num_ranks}")
    if home.size and (home.min() < 0 or home.max() >= num_ranks):
        raise PlanError(f"home names ranks {home.min()} to {home.max()}, but must be 0 to {num_ranks - 1}")
    owned = np.zeros((layers, num_ranks), np.int64)
    np.add.at(owned, (np.arange(layers)[:, None], home), 1)
    low, high = experts // num_ranks, -(-experts // num_ranks)
    wrong = (owned < low) | (owned > high)
    if wrong.any():
        layer, rank = (int(x[0]) for x in np.nonzero(wrong))
        raise PlanError(
            f"rank {rank} is home to {owned[layer, rank]} experts of layer {layer}, "
            f"but every rank must be home to {low}{f' or {high}' if high > low else ''}"
        )


def check_structure(
    home: np.ndarray, replicas: np.ndarray, quota: np.ndarray, kept: np.ndarray, gpus_per_node: int
) -> None:
    """Shapes, homes, and where replicas may be."""
    if home.ndim != 2 or replicas.ndim != 4 or len(home) != len(replicas):
        raise PlanError(f"home {home.shape} and replicas {replicas.shape} must be [L, E] and [L, M, R, S]")
    layers, _, ranks, slots = replicas.shape
    if quota.shape != replicas.shape or kept.shape != (layers, ranks, slots):
        raise PlanError(f"quota {quota.shape} and kept {kept.shape} must fit replicas {replicas.shape}")
    if gpus_per_node < 1 or ranks % gpus_per_node:
        raise PlanError(f"gpus_per_node is {gpus_per_node}, but must divide the {ranks} ranks")
    check_home(home, ranks)
    if replicas.size == 0:
        return
    if replicas.max() >= home.shape[1]:
        raise PlanError(f"a replica slot names expert {replicas.max()}, but there are {home.shape[1]}")
    _refuse((quota < 0) | ((replicas < 0) & (quota != 0)), "has a quota that is negative, or has one but no expert")
    pinned = np.broadcast_to(kept[:, None], replicas.shape)
    _refuse(pinned & (replicas != replicas[:, :1]), "is kept but changes its expert within the batch")
    for slot in range(1, slots):
        for other in range(slot):
            same = (replicas[..., slot] == replicas[..., other]) & (replicas[..., slot] >= 0)
            _refuse(same, "holds one expert twice")

    used = np.flatnonzero(replicas.reshape(-1) >= 0)
    layer, rank, expert = used // replicas[0].size, used // slots % ranks, replicas.reshape(-1)[used]
    own, far = np.zeros(replicas.size, bool), np.zeros(replicas.size, bool)
    own[used] = home[layer, expert] == rank
    _refuse(own.reshape(replicas.shape), "holds a replica of an expert that its rank owns")
    far[used] = ~_on_node(home, replicas[:, 0], kept, gpus_per_node)[layer, expert, rank // gpus_per_node]
    what = "is fetched, but its expert has neither its home nor a kept replica on that node"
    _refuse(far.reshape(replicas.shape) & ~pinned, what)


def _on_node(home: np.ndarray, replicas_LRS: np.ndarray, kept: np.ndarray, gpus_per_node: int) -> np.ndarray:
    """bool [L, E, N]: nodes on which an expert has its home or a kept replica."""
    layers, experts = home.shape
    there = np.zeros((layers, experts, replicas_LRS.shape[1] // gpus_per_node), np.bool_)
    there[np.arange(layers)[:, None], np.arange(experts), home // gpus_per_node] = True
    layer, rank, slot = np.nonzero(kept & (replicas_LRS >= 0))
    there[layer, replicas_LRS[layer, rank, slot], rank // gpus_per_node] = True
    return there


def check_quotas(table_LME: np.ndarray, replicas: np.ndarray, quota: np.ndarray) -> None:
    """The replicas of an expert take no more assignments than it has."""
    experts = table_LME.shape[2]
    used = np.flatnonzero(quota.reshape(-1) > 0)
    pair = used // (quota.shape[2] * quota.shape[3])
    left = table_LME.reshape(-1).copy()
    np.subtract.at(left, pair * experts + replicas.reshape(-1)[used], quota.reshape(-1)[used].astype(np.int64))
    if left.size and left.min() < 0:
        layer, micro_batch, expert = (int(x) for x in np.unravel_index(int(left.argmin()), table_LME.shape))
        raise PlanError(
            f"the replicas of expert {expert} in layer {layer}, micro-batch {micro_batch} take {-left.min()} "
            f"assignments more than the {table_LME[layer, micro_batch, expert]} that it has"
        )


def _refuse(bad: np.ndarray, what: str) -> None:
    if bad.any():
        where = ", ".join(
            f"{name} {int(x)}"
            for name, x in zip(("layer", "micro-batch", "rank", "slot"), np.argwhere(bad)[0], strict=False)
        )
        raise PlanError(f"the replica slot at {where} {what}")
