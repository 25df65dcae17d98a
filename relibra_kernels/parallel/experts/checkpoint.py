"""Checkpoints through `torch.distributed.checkpoint`, with experts in logical order.

Every expert tensor is written as one tensor [E, ...] in chunks of single experts, each by the rank that owns it, or of
parts of them by the ranks over which it is sharded. So a checkpoint depends neither on the placement nor on the number
of ranks, and is read with torch alone: its keys are `model.<name>` and `optimizer.<name>.<state>`, names those of the
whole model.

A checkpoint is written beside its place and renamed when all ranks are done: it is there whole, or not at all.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from ...nn import ReplicatedMoE
from ...planner.errors import CommunicationError, FormatError, InputError, ReLibraError
from ..comm.collectives import Comm
from ..comm.groups import Groups
from .logical import LogicalExperts, factor_of_parameter, layer_of_parameter
from .parameters import device_of


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
    layer_of, factors = layer_of_parameter(layers), factor_of_parameter(layers)
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
        if id(parameter) in factors:
            value = factors[id(parameter)].by_expert(value)
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


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Sequence[ReplicatedMoE],
    home_LE: np.ndarray,
    groups: Groups,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Write a checkpoint folder. Collective.

    Raises: InputError where `path` exists on any rank, or a rank has optimizer state that cannot be saved; FormatError
        where the folder cannot be made.
    """
    target, device = Path(path), device_of(layers)
    partial = target.with_name(target.name + ".partial")
    with groups.agreeing(device, f"saving {target}"):
        if target.exists():
            raise InputError(f"{target} exists already; a checkpoint is never overwritten")
        state = training_state(model, layers, home_LE, groups.experts, optimizer)

    def clear() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that died

    _on_first_rank(clear, groups, device, f"clearing {partial}")
    with _during(groups.experts, f"writing the checkpoint {target}"):
        dcp.save(state, checkpoint_id=partial, no_dist=groups.num_ranks == 1)
    _on_first_rank(lambda: partial.replace(target), groups, device, f"finishing {target}")


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Sequence[ReplicatedMoE],
    home_LE: np.ndarray,
    groups: Groups,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Read a checkpoint folder into the model and a new or used optimizer, in place. Collective.

    Raises: FormatError where a rank finds no checkpoint, or not of this model and optimizer; InputError on the others.
    """
    target = Path(path)
    is_new = optimizer is not None and not optimizer.state
    try:
        with groups.agreeing(device_of(layers), f"loading {target}"):
            if not (target / ".metadata").is_file():
                raise FormatError(f"{target} is no checkpoint: it has no .metadata")
            known = _names_in(target)
            if optimizer is not None:
                make_optimizer_state(optimizer)
            state = training_state(model, layers, home_LE, groups.experts, optimizer)
            lacks = [name for name in state if name not in known]
            if lacks:
                raise FormatError(f"{target} lacks {lacks[0]} and {len(lacks) - 1} more of this model and optimizer")
    except ReLibraError:
        if optimizer is not None and is_new:
            optimizer.state.clear()  # which was made to be filled
        raise
    with _during(groups.experts, f"reading the checkpoint {target}"):
        dcp.load(state, checkpoint_id=target, no_dist=groups.num_ranks == 1)
    if optimizer is not None:
        restore_numbers(model, optimizer, state)


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


def _names_in(checkpoint: Path) -> Collection[str]:
    try:
        names: Collection[str] = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a torn file makes of unpickling
        raise FormatError(f"{checkpoint} cannot be read: {type(error).__name__}: {error}") from error
    return names


def _on_first_rank(step: Callable[[], object], groups: Groups, device: torch.device, what: str) -> None:
    """One rank does it; all go on when it is done, or none where it cannot be. Collective."""
    with groups.agreeing(device, what):
        if all(comm.rank == 0 for comm in groups.all):
            try:
                step()
            except OSError as error:
                raise FormatError(f"{what} failed: {error}") from error
