"""Checkpoints through `torch.distributed.checkpoint`, with experts in logical order.

Every expert tensor is written as one tensor [E, ...] in chunks of single experts, each by the rank that owns it, or of
parts of them by the ranks over which it is sharded. So a checkpoint depends neither on the placement nor on the number
of ranks, and is read with torch alone: its keys are `model.<name>` and `optimizer.<name>.<state>`, names those of the
whole model.

A checkpoint is written beside its place and renamed when all ranks are done: it is there whole, or not at all.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ..nn import ReplicatedMoE
from ..planner.errors import CommunicationError, FormatError, InputError
from .comm import Comm
from .groups import Groups
from .logical import layer_of_parameter
from .migration import local_experts


class LogicalExperts(Tensor):
    """`[E, ...]` of all ranks, of which this one holds some rows: what `torch.distributed.checkpoint` saves and loads.

    Args:
        name: for errors.
        value: [E/R, ...], written to when loading; of a sharded one (DTensor) this rank has a part of each row.
        experts: int [E/R], which expert each row is.
        num_experts: E.
    """

    _local: Tensor
    _offset: tuple[int, ...]  # of the local part within an expert
    _row_of: dict[int, int]

    @staticmethod
    def __new__(cls, name: str, value: Tensor, experts: np.ndarray, num_experts: int) -> "LogicalExperts":
        shape = (num_experts, *value.shape[1:])
        wrapper: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=value.dtype, device=value.device)
        wrapper._local = local_experts(name, value.detach())
        wrapper._offset = (0,) * (value.ndim - 1)
        if isinstance(value, DTensor):
            (chunk,) = value.__create_chunk_list__()
            wrapper._offset = tuple(chunk.offsets[1:])
        wrapper._row_of = {int(expert): row for row, expert in enumerate(experts)}
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"LogicalExperts is for checkpoints only; it does not compute {func}")

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self._local.numel():
            return []
        size = torch.Size([1, *self._local.shape[1:]])
        return [ChunkStorageMetadata(torch.Size([expert, *self._offset]), size) for expert in sorted(self._row_of)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        row = self._row_of[index.offset[0]]
        return self._local[row : row + 1]


def training_state(
    model: nn.Module,
    layers: Sequence[ReplicatedMoE],
    home_LE: np.ndarray,
    comm: Comm,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """What a checkpoint holds: parameters, buffers and optimizer state, as tensors that are written or filled in place.

    Raises: InputError where the optimizer has state that cannot be told apart by expert.
    """
    layer_of = layer_of_parameter(layers)
    num_experts = home_LE.shape[1]

    def logical(parameter: Tensor, value: Any, name: str) -> Tensor:
        if isinstance(value, bool | int | float):
            return torch.tensor(value)
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is a {type(value).__name__}; only tensors and numbers can be saved")
        if id(parameter) not in layer_of or value.numel() == 1:
            return value
        if value.shape != parameter.shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}; it must be a single number or have the parameter's shape "
                f"{tuple(parameter.shape)}, otherwise it cannot be saved by expert"
            )
        experts = np.flatnonzero(home_LE[layer_of[id(parameter)]] == comm.rank)
        return LogicalExperts(name, value, experts, num_experts)

    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = logical(parameter, parameter.detach(), name)
        master = getattr(parameter, "main_param", None)
        if master is not None:
            state[f"optimizer.{name}.main_param"] = logical(parameter, master.detach(), f"the master of {name}")
        for key, value in optimizer_state(optimizer, parameter).items():
            if value is not None:
                state[f"optimizer.{name}.{key}"] = logical(parameter, value, f"optimizer state {key!r} of {name}")
    persistent = model.state_dict()
    state.update({f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent})
    return state


def optimizer_state(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter, or of its fp32 master; it may be written to."""
    if optimizer is None:
        return {}
    master = getattr(parameter, "main_param", None)
    state: dict[str, Any] = optimizer.state.get(parameter if master is None else master, {})
    return state


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let a new optimizer make its state, by a step with zero gradients that changes no parameter."""
    if optimizer.state:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [parameter.grad for parameter in parameters]
    rates = [(group, group["lr"], group.get("weight_decay")) for group in optimizer.param_groups if "lr" in group]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for group, rate, decay in rates:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
            if decay is not None:
                group["weight_decay"] = 0.0
        optimizer.step()
    finally:
        for group, rate, decay in rates:
            group["lr"] = rate
            if decay is not None:
                group["weight_decay"] = decay
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


def save(path: str | os.PathLike[str], state: dict[str, Any], groups: Groups, device: torch.device) -> None:
    """Write a checkpoint folder. Collective.

    Raises: InputError where `path` exists.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    problem = InputError(f"{target} exists already; a checkpoint is never overwritten") if target.exists() else None
    groups.agree(problem, {}, device, f"saving {target}")
    first = all(comm.rank == 0 for comm in groups.all)
    if first:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that died
    _barrier(groups, device, f"clearing {partial}")
    with _during(groups.experts, f"writing the checkpoint {target}"):
        dcp.save(state, checkpoint_id=partial, no_dist=groups.num_ranks == 1)
    if first:
        partial.replace(target)
    _barrier(groups, device, f"finishing {target}")


def load(path: str | os.PathLike[str], state: dict[str, Any], groups: Groups) -> None:
    """Fill the tensors of `state` from a checkpoint folder, in place. Collective.

    Raises: FormatError where there is no checkpoint, or not of this model and optimizer.
    """
    target = Path(path)
    if not (target / ".metadata").is_file():
        raise FormatError(f"{target} is no checkpoint: it has no .metadata")
    known = dcp.FileSystemReader(target).read_metadata().state_dict_metadata
    missing = [name for name in state if name not in known]
    if missing:
        raise FormatError(f"{target} lacks {missing[0]} and {len(missing) - 1} more of this model and optimizer")
    with _during(groups.experts, f"reading the checkpoint {target}"):
        dcp.load(state, checkpoint_id=target, no_dist=groups.num_ranks == 1)


def restore_numbers(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put optimizer state that is a plain number, not a tensor, back in its place."""
    for name, parameter in model.named_parameters():
        own = optimizer_state(optimizer, parameter)
        for key, value in own.items():
            if isinstance(value, bool | int | float):
                own[key] = type(value)(state[f"optimizer.{name}.{key}"].item())


@contextmanager
def _during(comm: Comm, phase: str) -> Iterator[None]:
    """As `Comm.during`; what failed on ranks that still answer is a CheckpointException, which is no Exception."""
    with comm.during(phase):
        try:
            yield
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise CommunicationError(f"rank {comm.rank}: {phase} failed on rank {rank}: {reason}") from error


def _barrier(groups: Groups, device: torch.device, what: str) -> None:
    for comm in groups.all:
        comm.all_reduce(torch.zeros(1, device=device), what)
