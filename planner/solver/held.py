"""What ranks hold and compute in all micro-batches of some layers, while swaps of replicas or homes are tried."""

from dataclasses import dataclass

import numpy as np

from ..plan import held_experts
from .exact import FAR
from .fetched import Slots
from .fetched_by_flow import flow_of_slots, level_slots
from .solution import Solution


@dataclass(eq=False)
class Held:
    """Layers without fetched replicas; changed in place.

    Attributes:
        expert_LRQ: int64, the expert in every slot, home slots first; -1 in empty ones.
        load_LMRQ: int64, assignments of every slot.
        home_slots: of a rank.
        experts: of a layer.
    """

    expert_LRQ: np.ndarray
    load_LMRQ: np.ndarray
    home_slots: int
    experts: int

    @staticmethod
    def of(table_LME: np.ndarray, solution: Solution) -> "Held":
        layers, ranks, _ = solution.kept.shape
        homes = held_experts(solution.home, ranks)
        left = table_LME.astype(np.int64)
        at = np.nonzero(solution.quota)
        np.subtract.at(left, (at[0], at[1], solution.replicas[at]), solution.quota[at].astype(np.int64))
        at_home = np.take_along_axis(left, np.maximum(homes, 0).reshape(layers, 1, -1), 2)
        at_home = np.where(homes[:, None] >= 0, at_home.reshape(*left.shape[:2], *homes.shape[1:]), 0)
        kept = np.where(solution.kept, solution.replicas[:, 0], -1)
        return Held(
            np.concatenate([homes, kept], 2).astype(np.int64),
            np.concatenate([at_home, solution.quota], 3),
            homes.shape[2],
            table_LME.shape[2],
        )

    def of_layers(self, layers: np.ndarray) -> "Held":
        return Held(self.expert_LRQ[layers], self.load_LMRQ[layers], self.home_slots, self.experts)

    def put(self, layers: np.ndarray, other: "Held") -> None:
        self.expert_LRQ[layers], self.load_LMRQ[layers] = other.expert_LRQ, other.load_LMRQ

    def slots(self) -> Slots:
        """All micro-batches, as pairs without free slots."""
        whole = np.broadcast_to(self.expert_LRQ[:, None], self.load_LMRQ.shape).reshape(-1, *self.expert_LRQ.shape[1:])
        load = self.load_LMRQ.reshape(whole.shape).copy()
        return Slots(whole.copy(), load, np.zeros(load.shape[:2], np.int64), np.zeros(load.shape, np.bool_))

    def level(self, target_LM: np.ndarray, sweeps: int) -> None:
        """Split every micro-batch exactly over what is held."""
        state = self.slots()
        level_slots(state, target_LM.reshape(-1), self.experts, sweeps)
        self.load_LMRQ = state.load.reshape(self.load_LMRQ.shape)

    def over(self, target_LM: np.ndarray) -> np.ndarray:
        """int64 [L]: what the busiest rank has above its target, in all micro-batches."""
        return np.maximum(self.load_LMRQ.sum(3).max(2) - target_LM, 0).sum(1)

    def stuck(self, target_LM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [L, M, R], ranks from which nothing can be passed on to a rank with room; int64 [L, M], what they have
        above the target."""
        shape = self.load_LMRQ.shape[:3]
        flow, _ = flow_of_slots(self.slots(), self.experts)
        full = np.repeat(target_LM.reshape(-1), shape[2])
        steps, _ = flow.distances(flow.load < full, np.ones(len(flow.load), np.bool_))
        stuck = (steps >= FAR).reshape(shape)
        return stuck, np.where(stuck, np.maximum(flow.load - full, 0).reshape(shape), 0).sum(2)
