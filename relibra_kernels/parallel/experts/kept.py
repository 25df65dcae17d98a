"""Kept replicas: fetched once a batch, with a gradient buffer that goes home once.

Weights cross to another node once, to the relay that hands them on to the node's other ranks that keep the expert.
Gradients go the way back: a relay adds up those of its node before its own goes home. Where weights are there only
while their layer runs, nothing is kept: what the plan keeps is fetched for every micro-batch, like any other replica.
"""

from collections.abc import Callable

import numpy as np
import torch

from ...planner import BatchPlan
from ...weights import ExpertWeights, replica_store
from ..comm.collectives import Comm
from . import blob
from .replicas import GradientReturn, Transfers, home_slot_of_expert, transfers


def sources_of_fetched(plan: BatchPlan, kept_LRS: np.ndarray) -> np.ndarray:
    """int32 [L, M, R, S]: the rank that sends each replica that is fetched, -1 for empty and kept slots.

    Replicas of a layer that keeps fewer than the plan says come from their homes, on whatever node.

    Args:
        kept_LRS: bool, the replicas that are kept: the plan's, or none.
    """
    wanted = plan.kept & (plan.replicas[:, 0] >= 0)
    as_planned = (wanted == kept_LRS).all((1, 2))
    owner = np.take_along_axis(plan.home[:, None, None], plan.replicas.clip(min=0), 3)
    at_home = np.where((plan.replicas >= 0) & ~kept_LRS[:, None], owner, -1)
    return np.where(as_planned[:, None, None, None], plan.sources(), at_home)


class KeptReplicas:
    """The kept replicas of one batch on one rank. Making it fetches them: collective.

    Args:
        weights_of: the home weights of a layer.
        kept_LRS: bool, the replicas that are kept: the plan's, or none.
    """

    def __init__(
        self,
        comm: Comm,
        plan: BatchPlan,
        weights_of: Callable[[int], ExpertWeights],
        kept_LRS: np.ndarray,
        device: torch.device,
    ):
        self._comm, self.kept_LRS = comm, kept_LRS
        self._rounds: dict[int, list[Transfers]] = {}  # of each layer: from the homes, then from the relays
        self._slots: dict[int, np.ndarray] = {}
        self._weights: dict[int, ExpertWeights] = {}
        self._gradients: dict[int, ExpertWeights] = {}
        sources = plan.kept_sources() if kept_LRS.any() else None
        for layer in np.flatnonzero(kept_LRS.any((1, 2))).tolist():
            assert sources is not None
            self._fetch(plan, layer, sources[layer], weights_of(layer), device)

    def _fetch(
        self, plan: BatchPlan, layer: int, source_RS: np.ndarray, home: ExpertWeights, device: torch.device
    ) -> None:
        rank, experts = self._comm.rank, plan.replicas[layer, 0]
        source = np.where(self.kept_LRS[layer], source_RS, -1)
        from_home = source == plan.home[layer][experts.clip(min=0)]
        first, second = (np.where(of_round, source, -1) for of_round in (from_home, ~from_home))
        own = home_slot_of_expert(plan, layer, rank)
        nowhere = np.full(plan.num_experts, -1, np.int64)
        moved = [transfers(experts, first, own, nowhere, rank, device)]
        direct = moved[0].arrivals
        relayed = nowhere.copy()
        relayed[experts[rank, direct]] = np.arange(len(direct))
        moved.append(transfers(experts, second, nowhere, relayed, rank, device))
        slots = np.concatenate([direct, moved[1].arrivals])
        like = home.map(torch.Tensor.detach)
        phase = f"the kept replicas of layer {layer}"
        counts = moved[0].push_counts, moved[0].pull_counts
        rows = self._comm.exchange(moved[0].pack(home, None), *counts, "kept_weights", phase)
        if moved[1].anywhere:
            counts = moved[1].push_counts, moved[1].pull_counts
            leaving = rows.index_select(0, moved[1].from_kept)
            handed = self._comm.exchange(leaving, *counts, "kept_weights", f"{phase}, from their relays")
            rows = torch.cat([rows, handed])
        self._rounds[layer], self._slots[layer] = moved, slots
        self._weights[layer] = blob.unpack(rows, like)

    def slots(self, layer: int) -> np.ndarray:
        """int64: the replica slots of this rank that are kept, in the order of their store."""
        return self._slots.get(layer, np.zeros(0, np.int64))

    def weights(self, layer: int) -> ExpertWeights | None:
        """[kept, ...]; None where the layer has none anywhere."""
        return self._weights.get(layer)

    def gradients(self, layer: int, homes: ExpertWeights) -> ExpertWeights:
        """Sums [kept, ...] to be added to, zeros at first; None where a gradient is not wanted now.

        Args:
            homes: gradient buffers of the homes, whose dtypes they have and beside which they lie (`replica_store`).
        """
        known = self._gradients.get(layer) or ExpertWeights(None, None)
        made = [
            replica_store(home, len(weight)).zero_() if total is None and home is not None else total
            for total, weight, home in zip(known, self._weights[layer], homes, strict=True)
        ]
        self._gradients[layer] = ExpertWeights(*made)
        return ExpertWeights(*(None if home is None else total for total, home in zip(made, homes, strict=True)))

    def give_back(self, gradients_of: Callable[[int], ExpertWeights]) -> None:
        """Send the sums home and add them to the owners' gradients, in place. Collective, once a batch.

        A layer whose backward did not run has nothing to send, on any rank.
        """
        for layer, gradients in sorted(self._gradients.items()):
            direct, relayed = self._rounds[layer]
            count = len(direct.arrivals)
            phase = f"the kept replicas' gradients of layer {layer}"
            own = gradients.map(lambda grad, count=count: grad[:count])  # type: ignore[misc]
            if relayed.anywhere:
                handed = gradients.map(lambda grad, count=count: grad[count:])  # type: ignore[misc]
                back = GradientReturn(self._comm, relayed, handed, f"{phase}, to their relays", "kept_gradients")
                back.finish(None, own)
            owners = gradients_of(layer)
            fp32 = owners.map(lambda owner: owner.to(torch.promote_types(owner.dtype, torch.float32)))
            GradientReturn(self._comm, direct, own, phase, "kept_gradients").finish(fp32)
            for owner, total in zip(owners.tensors(), fp32.tensors(), strict=True):
                if owner is not total:
                    owner.copy_(total)
        self._gradients.clear()

    def close(self) -> None:
        """Free the memory: the weights that were fetched are out of date after the batch."""
        self._weights.clear()
        self._gradients.clear()
