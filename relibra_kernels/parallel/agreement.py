"""How a batch opens: every rank checks what it was given, and all agree, before anything changes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn import ReplicatedMoE
from ..planner import BatchPlan, ClusterSpec
from ..planner.errors import InputError, ReLibraError
from .checks import check_optimizer, check_plan
from .comm.groups import Groups
from .digests import checksum, digests, model_digest
from .experts.logical import layer_of_parameter
from .experts.parameters import device_of, tensors_to_move


class Opening:
    """What is checked and agreed on for every batch of a model; the weights for the first one only."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ReplicatedMoE],
        groups: Groups,
        cluster: ClusterSpec,
        model_name: str,
        compare_dense: bool,
    ):
        self._compare_dense = compare_dense
        self._model, self._layers, self._groups = model, layers, groups
        self._cluster, self._model_name = cluster, model_name
        self._weights_compared = False

    def agree(
        self,
        plan: BatchPlan,
        optimizer: torch.optim.Optimizer | None,
        home_LE: np.ndarray,
        configuration: tuple[object, ...],
        *,
        is_open: bool,
        micro_batches: int,
        counted: bool,
        problem: ReLibraError | None = None,
    ) -> tuple[list[dict[str, Tensor]], bool]:
        """All ranks go on from the same, or none does. Collective.

        Args:
            configuration: whatever else must be the same on all ranks.
            is_open: whether a batch is open already. micro_batches: of the routed batch.
            counted: whether this rank has the loads of the group.
            problem: what is wrong on this rank already.
        Returns: what moves with the experts of each layer, and whether every rank has the loads.
        Raises: PlanError, InputError.
        """
        tensors: list[dict[str, Tensor]] = []
        try:
            if problem is not None:
                raise problem
            if is_open:
                raise InputError("a batch is open already: leave it before the next begins")
            check_plan(plan, self._layers, home_LE.shape[1], self._cluster, self._model_name)
            check_optimizer(optimizer, self._layers)
            tensors = [tensors_to_move(moe.experts, optimizer) for moe in self._layers]
        except ReLibraError as error:
            problem = error
        common = {
            "the model": model_digest(self._layers),
            "the placement": checksum(home_LE),
            "the plan's placement": checksum(plan.home),
            "the configuration": checksum(self._cluster, self._groups.shape, *configuration),
            "num_micro_batches": micro_batches,
            "the optimizer's state": checksum([list(of_layer) for of_layer in tensors]),
        }
        own = {"the plan": checksum(plan.home, plan.replicas, plan.quota, plan.kept)}
        device = device_of(self._layers)
        counted = self._groups.agree(problem, common, device, "opening the batch", own, counted)
        if not self._weights_compared:
            check_same_weights(self._model, self._layers, self._groups, self._compare_dense)
            self._weights_compared = True
        return tensors, counted


def check_same_weights(model: nn.Module, layers: Sequence[ReplicatedMoE], groups: Groups, compare_dense: bool) -> None:
    """Every rank has the same dense parameters (if they are compared), and ranks that hold copies of experts the same
    experts. Collective.

    Sharded parameters (DTensor) are not looked at, nor are buffers, which may differ.
    Raises: InputError naming a rank and the first parameter that differs.
    """
    experts = layer_of_parameter(layers)
    whole = {f"parameter {n}": p for n, p in model.named_parameters() if not isinstance(p, DTensor)}
    dense = {name: p for name, p in whole.items() if id(p) not in experts and compare_dense}
    copied = {name: p for name, p in whole.items() if id(p) in experts and groups.copies}
    device, what = device_of(layers), "comparing the weights"
    kinds = [(name, tuple(p.shape), p.dtype) for name, p in dense.items()]
    groups.agree(None, {"the list of dense parameters": checksum(kinds)}, device, what)
    groups.agree(None, digests(dense, device), device, what, of_copies=digests(copied, device))
