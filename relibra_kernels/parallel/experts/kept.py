"""Kept replicas: fetched once a batch, with a gradient buffer that goes home once.

They cross the slow network twice a batch instead of three times a micro-batch, for the memory of their weights and
fp32 gradients. What does not fit the budget is fetched for every micro-batch like any other replica.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...planner import BatchPlan
from ...weights import ExpertWeights, zeros_fp32
from ..comm.collectives import Comm
from .replicas import GradientReturn, Transfers, transfers


def replicas_to_keep(plan: BatchPlan, bytes_each: Sequence[int], budget: int | None) -> np.ndarray:
    """bool [L, R, S]: the replicas that are kept. Layers in turn, while the fullest rank stays within its budget.

    Args:
        bytes_each: weights and gradient of one expert of each layer.
        budget: bytes a rank over all layers; None: no limit.
    """
    chosen = plan.kept & (plan.replicas[:, 0] >= 0)
    used = np.zeros(plan.num_ranks, np.int64)
    for layer, each in enumerate(bytes_each):
        need = used + chosen[layer].sum(1) * each
        if budget is not None and need.max() > budget:
            chosen[layer] = False
        else:
            used = need
    return chosen


class KeptReplicas:
    """The kept replicas of one batch on one rank. Making it fetches them: collective.

    Args:
        weights_of: the home weights of a layer.
        kept_LRS: from `kept_kept`.
    """

    def __init__(self, comm: Comm, plan: BatchPlan, weights_of: Callable[[int], ExpertWeights], kept_LRS: np.ndarray):
        self._comm, self.kept_LRS = comm, kept_LRS
        self._transfers: dict[int, Transfers] = {}
        self._weights: dict[int, ExpertWeights] = {}
        self._gradients: dict[int, ExpertWeights] = {}
        for layer in np.flatnonzero(kept_LRS.any((1, 2))).tolist():
            experts = np.where(kept_LRS[layer], plan.replicas[layer, 0], -1)
            moved = self._transfers[layer] = transfers(plan, layer, experts, comm.rank)

            def fetch(weight: Tensor, layer: int = layer, moved: Transfers = moved) -> Tensor:
                slots = torch.from_numpy(moved.home_slots).to(weight.device)
                counts = moved.push_counts, moved.pull_counts
                phase = f"the kept replicas of layer {layer}"
                return comm.exchange(weight.detach().index_select(0, slots), *counts, "kept_weights", phase)

            self._weights[layer] = weights_of(layer).map(fetch)

    def transfers(self, layer: int) -> Transfers | None:
        """How they came; None where the layer has none anywhere."""
        return self._transfers.get(layer)

    def weights(self, layer: int) -> ExpertWeights | None:
        """[kept, ...]; None where the layer has none anywhere."""
        return self._weights.get(layer)

    def add_gradients(self, layer: int, gradients: ExpertWeights) -> None:
        """Add one micro-batch's gradients [kept, ...]; None where a weight is not trained."""
        if layer not in self._gradients:
            self._gradients[layer] = gradients.map(zeros_fp32)
        for total, new in zip(self._gradients[layer].tensors(), gradients.tensors(), strict=True):
            total.add_(new)

    def give_back(self, gradients_of: Callable[[int], ExpertWeights]) -> None:
        """Send the sums home and add them to the owners' gradients, in place. Collective, once a batch.

        A layer whose backward did not run has nothing to send, on any rank.
        """
        for layer, gradients in sorted(self._gradients.items()):
            owners = gradients_of(layer)
            fp32 = owners.map(lambda owner: owner.to(torch.promote_types(owner.dtype, torch.float32)))
            phase = f"the kept replicas' gradients of layer {layer}"
            back = GradientReturn(self._comm, self._transfers[layer], gradients, fp32, phase, "kept_gradients")
            back.finish()
            for owner, total in zip(owners.tensors(), fp32.tensors(), strict=True):
                if owner is not total:
                    owner.copy_(total)
        self._gradients.clear()

    def close(self) -> None:
        """Let go of the memory: what was fetched is out of date after the batch."""
        self._weights.clear()
        self._gradients.clear()
