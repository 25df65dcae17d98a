"""What a policy makes of a batch, in the terms that cost it: the one form in which plans and baselines are compared."""

from dataclasses import dataclass

import numpy as np

from ..loads import total_loads
from ..plan import BatchPlan


@dataclass(frozen=True, eq=False)
class Outcome:
    """L layers, M micro-batches, R ranks; arrays of counts.

    slot_load:  int [L, M, R, P]  assignments computed in each of a rank's places for experts (home, then replica)
    pushed_in, pushed_out:  int [L, M, R]  replicas whose weights a rank gets or gives for this micro-batch, in its node
    far_in, far_out:        int [L, M, R]  the same between nodes
    kept_in, kept_out:      int [L, R]     replicas of another node fetched once and kept for the batch
    moved_in, moved_out:    int [L, R]     experts that changed their owner before the batch, with optimizer state
    """

    slot_load: np.ndarray
    pushed_in: np.ndarray
    pushed_out: np.ndarray
    far_in: np.ndarray
    far_out: np.ndarray
    kept_in: np.ndarray
    kept_out: np.ndarray
    moved_in: np.ndarray
    moved_out: np.ndarray

    @property
    def rank_load(self) -> np.ndarray:
        """int [L, M, R]."""
        return self.slot_load.sum(3)

    def imbalance(self) -> np.ndarray:
        """float [L, M], nan without load."""
        load = self.rank_load
        mean = load.mean(2)
        return np.divide(load.max(2), mean, out=np.full(mean.shape, np.nan), where=mean > 0)

    @staticmethod
    def of(slot_load: np.ndarray, **counts: np.ndarray) -> "Outcome":
        """An outcome in which everything that is not named is zero."""
        layers, micro_batches, ranks, _ = slot_load.shape
        zeros = {
            name: np.zeros(
                (layers, ranks) if name[:4] in ("kept", "move") else (layers, micro_batches, ranks), np.int64
            )
            for name in Outcome.__dataclass_fields__
            if name != "slot_load"
        }
        return Outcome(slot_load, **{**zeros, **counts})


def outcome_of_plan(plan: BatchPlan, loads: np.ndarray, previous_home: np.ndarray | None = None) -> Outcome:
    """What a BatchPlan costs. Without a previous placement nothing counts as moved."""
    table = total_loads(loads)
    layers, micro_batches, ranks = plan.replicas.shape[:3]
    experts = np.argsort(plan.home, axis=1, kind="stable")
    left = table.copy()
    layer, micro_batch, rank, slot = np.nonzero(plan.replicas >= 0)
    expert = plan.replicas[layer, micro_batch, rank, slot]
    np.subtract.at(left, (layer, micro_batch, expert), plan.quota[layer, micro_batch, rank, slot].astype(np.int64))
    at_home = np.take_along_axis(left, experts[:, None], 2).reshape(layers, micro_batches, ranks, -1)
    owner = plan.home[layer, expert]
    kept = plan.kept[layer, rank, slot]

    def count(index: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
        out = np.zeros(shape, np.int64)
        np.add.at(out, index, 1)
        return out

    near, once = ~kept, kept & (micro_batch == 0)
    by_batch, by_layer = (layers, micro_batches, ranks), (layers, ranks)
    counts = {
        "pushed_in": count((layer[near], micro_batch[near], rank[near]), by_batch),
        "pushed_out": count((layer[near], micro_batch[near], owner[near]), by_batch),
        "kept_in": count((layer[once], rank[once]), by_layer),
        "kept_out": count((layer[once], owner[once]), by_layer),
    }
    if previous_home is not None:
        moved_layer, moved = np.nonzero(plan.home != previous_home)
        counts["moved_in"] = count((moved_layer, plan.home[moved_layer, moved]), by_layer)
        counts["moved_out"] = count((moved_layer, previous_home[moved_layer, moved]), by_layer)
    return Outcome.of(np.concatenate([at_home, plan.quota.astype(np.int64)], 3), **counts)
