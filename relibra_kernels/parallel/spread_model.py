"""A model whose experts are spread over ranks: its parameters and gradients, and how they are moved and saved."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..planner import ClusterSpec, ModelShape
from ..planner.errors import InputError
from ..planner.plan import contiguous_home
from ..planner.pricing.models import shape_of_sizes
from .attachment import attach, refuse_to_save
from .comm.groups import Groups
from .experts import checkpoint, gradients
from .experts.adapters import adapter_rank, find_adapters
from .experts.logical import logical_tensors
from .experts.migration import move_layers, spread_state
from .experts.parameters import (
    all_experts,
    device_of,
    expert_parameters,
    keep_experts,
    layers_to_share,
    tensors_to_move,
)
from .live import LiveRouting
from .running import ModelRunner
from .session import RuntimeOptions
from .transports import chosen_transport, make_transport


class SpreadModel:
    """What `ExpertParallel` is between batches: every rank keeps E/R experts of every layer as parameters."""

    def __init__(
        self,
        model: nn.Module,
        cluster: ClusterSpec,
        mesh: DeviceMesh | None,
        reduction: Literal["sum", "mean"],
        options: RuntimeOptions | None,
    ):
        self.model, self.cluster = model, cluster
        if reduction not in ("sum", "mean"):
            raise InputError(f"reduction is {reduction!r}; it must be 'sum' or 'mean'")
        self.reduction, self.options = reduction, options or RuntimeOptions()
        self.groups = Groups(mesh, cluster)
        self.comm = self.groups.experts
        self.layers = layers_to_share(model)
        find_adapters(model, self.layers)
        self.num_experts = all_experts(self.layers[0].experts)
        home_slots = cluster.home_slots(self.num_experts)
        shape = self._shape()
        transport = chosen_transport(self.options.transport, self.groups, cluster, shape)
        self._transport = make_transport(transport, self.groups, cluster, shape)
        home = contiguous_home(len(self.layers), self.num_experts, cluster.num_ranks)  # [L, E]
        self._runner = ModelRunner(LiveRouting(self._transport, home, self.options))
        for layer, moe in enumerate(self.layers):
            keep_experts(moe.experts, np.flatnonzero(home[layer] == self.comm.rank).tolist(), home_slots)
            attach(moe, self._runner, layer, self.comm.rank)
        refuse_to_save(model)

    @property
    def home(self) -> np.ndarray:
        """int32 [L, E]: the rank that owns each expert now."""
        return self._runner.live.home

    @home.setter
    def home(self, home_LE: np.ndarray) -> None:
        self._runner.live.home = home_LE

    @property
    def device(self) -> torch.device:
        return device_of(self.layers)

    def expert_parameters(self) -> list[nn.Parameter]:
        """This rank's experts and their adapters: what FSDP2 (`ignored_params`) and DDP must leave alone."""
        find_adapters(self.model, self.layers)
        return [parameter for moe in self.layers for _, parameter in expert_parameters(moe.experts)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """All other parameters of the model."""
        experts = {id(parameter) for parameter in self.expert_parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in experts]

    def _move(self, tensors: list[dict[str, Tensor]], home_LE: np.ndarray, optimizer: Any) -> None:
        gather = getattr(optimizer, "gather", None)
        parameters = [expert_parameters(moe.experts) for moe in self.layers]
        with spread_state(gather, parameters, tensors, self.home != home_LE):
            move_layers(self.comm, tensors, self.home, home_LE, self.device)

    def move_home(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move the experts, and their state, to where they were at first: rank by rank, in their order. Collective.

        For checkpoints of other frameworks that save optimizer state by rank.
        """
        self._check_between_batches("move_home")
        find_adapters(self.model, self.layers)
        tensors = [tensors_to_move(moe.experts, optimizer) for moe in self.layers]
        self._move(tensors, contiguous_home(len(self.layers), self.num_experts, self.comm.size), optimizer)

    def reduce_gradients(self, *, dense: bool = True) -> None:
        """Reduce gradients over the ranks, in place, by `reduction`. Collective; after the batch is left.

        Expert gradients are whole within their group already: every rank's tokens came to them. They are summed over
        the groups. Sharded gradients (FSDP2) are left as they are.

        Args:
            dense: False where DDP reduces everything but the experts.
        """
        scale = 1.0 if self.reduction == "sum" else 1.0 / self.groups.num_ranks
        experts = [p for p in self.expert_parameters() if p.requires_grad]
        gradients.reduce_dense(self.groups.copies, experts, scale, self.device)
        if dense:
            whole = [p for p in self.dense_parameters() if p.requires_grad and not isinstance(p, DTensor)]
            gradients.reduce_dense(self.groups.all, whole, scale, self.device)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the whole model, experts of all ranks included, to one norm. Collective.

        Returns: the norm before, 0-d, the same on every rank.
        """
        experts, dense = self.expert_parameters(), self.dense_parameters()
        norm = gradients.total_norm(self.comm, experts, dense, self.device)
        gradients.clip([*experts, *dense], norm, max_norm)
        return norm

    def named_logical_parameters(
        self,
        tensor_of: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.data,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter under its name in the whole model, experts [E, ...] in logical order. Collective.

        One tensor is gathered at a time, some experts at a time, so that a rollout engine can be fed after every step:
        it takes the memory of that tensor, and an eighth of it on the way. `model.state_dict()` has this rank's experts
        only, in the order of its home slots.

        Args:
            tensor_of: what to give for each parameter instead of its data, such as its gradient.
            names: the parameters that are wanted, the same on every rank; None: all. Others are not gathered.
        Raises: InputError for a name that the model has not.
        """
        known = {name for name, _ in self.model.named_parameters()}
        if names is not None and not known.issuperset(names):
            raise InputError(f"names has {min(set(names) - known)!r}, but the model has no parameter of that name")
        return logical_tensors(self.model, self.layers, self.home, self.comm, tensor_of, names)

    def save_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write parameters, buffers and optimizer state to a new folder, whole or not at all. Collective.

        It depends neither on the placement nor on the number of ranks; `torch.distributed.checkpoint` reads it.
        """
        self._check_between_batches("save_checkpoint")
        checkpoint.save(path, self.model, self.layers, self.home, self.groups, optimizer)

    def load_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read what `save_checkpoint` wrote into the model and a new or used optimizer, in place. Collective.

        Any number of ranks and any placement will do. Hyper-parameters of the optimizer are not part of a checkpoint.
        Raises: FormatError where there is no checkpoint, or it is of another model or optimizer.
        """
        self._check_between_batches("load_checkpoint")
        checkpoint.load(path, self.model, self.layers, self.home, self.groups, optimizer)

    def _shape(self) -> ModelShape:
        """Sizes of the MoE layers, with the rank of the adapters that they have now."""
        find_adapters(self.model, self.layers)
        experts, top_k = self.layers[0].experts, self.layers[0].router.top_k
        sizes = experts.hidden_size, experts.intermediate_size, self.num_experts, top_k
        shape = shape_of_sizes(*sizes, layers=len(self.layers), has_gate=experts.form.has_gate)
        size = max(weight.element_size() for weight in experts.parameters())
        return dataclasses.replace(shape, adapter_rank=adapter_rank(experts), parameter_bytes=size)

    def _check_between_batches(self, what: str) -> None:
        if self._runner.batch is not None:
            raise InputError(f"{what} is used within a batch: leave it first")
