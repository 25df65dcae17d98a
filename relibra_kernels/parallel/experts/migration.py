"""Inter-batch reordering: experts move, with all tensors of theirs, to the rank that is their home in the next plan.

What moves for each expert is one row of every tensor that has the shape of the expert parameter: the weights, an fp32
master, the optimizer's moments, gradients that are still held. Layer by layer: the rows that arrive are staged, every
rank confirms, then rows are swapped in place; so a failure leaves each layer either wholly moved or untouched, and
`home` says which. Memory: the rows of one layer that move.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from ...planner.errors import InputError
from ..comm.collectives import Comm


def expert_tensors(parameter: Parameter, name: str, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Every tensor that belongs to the experts of `parameter` [E/R, ...], by name, in a fixed order.

    Of a sharded tensor (DTensor), this rank's part of every expert.
    Raises: InputError for optimizer state that is neither of the parameter's shape nor a single number, and for tensors
        of a kind of their own (of 8-bit optimizers), since they cannot be split by expert.
    """
    tensors = _of_parameter(parameter, name, optimizer)
    master = getattr(parameter, "main_param", None)
    if master is not None and not getattr(parameter, "main_param_sharded", False):  # which is its optimizer's to give
        if master.shape != parameter.shape:
            raise InputError(
                f"the master of {name} has shape {tuple(master.shape)}; it must have the parameter's shape "
                f"{tuple(parameter.shape)}, otherwise it cannot move with an expert"
            )
        tensors.update(_of_parameter(master, f"{name}.main_param", optimizer))
    return {key: _plain(key, local_experts(key, tensor)) for key, tensor in tensors.items()}


def move_layers(
    comm: Comm, tensors: Sequence[dict[str, Tensor]], home_LE: np.ndarray, new_home_LE: np.ndarray, device: torch.device
) -> None:
    """Move every layer's experts to `new_home_LE`; `home_LE`, in place, says which layers have moved. Collective."""
    with comm.ledger.span("migration", device):
        for layer, of_layer in enumerate(tensors):
            move_experts(comm, of_layer, home_LE[layer], new_home_LE[layer], f"layer {layer}", device)
            home_LE[layer] = new_home_LE[layer]


class Spread(Protocol):
    """Tensors of one parameter that copies of the experts hold in parts, put together."""

    tensors: dict[str, Tensor]

    def scatter(self) -> None:
        """Put this rank's parts back."""


@contextmanager
def spread_state(
    gather: Callable[[Parameter], Spread | None] | None,
    parameters: Sequence[Sequence[tuple[str, Parameter]]],
    tensors: Sequence[dict[str, Tensor]],
    moves_LE: np.ndarray,
) -> Iterator[None]:
    """Within, `tensors` of layers in which experts move have the spread state too. Collective over the copies.

    Args:
        gather: of an optimizer that spreads its state. parameters: of every layer, by name.
    """
    found: list[Spread] = []
    for layer in np.flatnonzero(moves_LE.any(1)).tolist() if gather is not None else ():
        for name, parameter in parameters[layer]:
            spread = gather(parameter) if gather is not None and parameter.requires_grad else None
            if spread is not None:
                found.append(spread)
                tensors[layer].update({f"{name}.{key}": tensor for key, tensor in spread.tensors.items()})
    yield
    for spread in found:
        spread.scatter()


def move_experts(
    comm: Comm, tensors: dict[str, Tensor], old_home: np.ndarray, new_home: np.ndarray, where: str, device: torch.device
) -> None:
    """Move one layer's experts from `old_home` [E] to `new_home` [E], in place in every tensor [E/R, ...]. Collective.

    Home slots hold a rank's experts in ascending order, before and after. Every rank must bring the same tensors, by
    name.

    Args:
        device: rows travel on it, also those of tensors that are elsewhere: optimizer state that is offloaded.
    """
    if np.array_equal(old_home, new_home):
        return
    me = comm.rank
    before, after = np.flatnonzero(old_home == me), np.flatnonzero(new_home == me)
    leaving = [np.flatnonzero((old_home == me) & (new_home == r) & (r != me)) for r in range(comm.size)]
    arriving = [np.flatnonzero((old_home == r) & (new_home == me) & (r != me)) for r in range(comm.size)]
    send_counts, receive_counts = [len(experts) for experts in leaving], [len(experts) for experts in arriving]
    send_slots = np.searchsorted(before, np.concatenate(leaving))
    arrivals = np.concatenate(arriving)
    # Where each row of the new order comes from: an old slot, or the number of slots + a position among the arrivals.
    slots = -(-len(old_home) // comm.size)
    source = np.searchsorted(before, after).clip(max=len(before) - 1)
    new = ~np.isin(after, before)
    by_expert = np.argsort(arrivals, kind="stable")
    source[new] = slots + by_expert[np.searchsorted(arrivals[by_expert], after[new])]

    staged = {}
    for name, tensor in tensors.items():
        send = tensor.detach().index_select(0, torch.from_numpy(send_slots).to(tensor.device))
        phase = f"{where}, moving {name}"
        arrived = comm.exchange(send.to(device), send_counts, receive_counts, "migration", phase)
        staged[name] = arrived.to(tensor.device)
    confirmed = torch.ones(1, device=device)
    comm.all_reduce(confirmed, f"{where}, confirming")
    for name, tensor in tensors.items():
        if len(before) == len(after) == slots:
            _reorder_rows(tensor, staged[name], source.tolist())
        else:
            _refill_rows(tensor, staged[name], source.tolist())


@torch.no_grad()
def _refill_rows(tensor: Tensor, arrivals: Tensor, source: list[int]) -> None:
    """As `_reorder_rows`, where a slot is empty before or after: an empty slot is zeros."""
    rows = torch.cat([tensor, arrivals])[source]
    tensor[: len(source)] = rows
    tensor[len(source) :] = 0


def _reorder_rows(tensor: Tensor, arrivals: Tensor, source: list[int]) -> None:
    """`tensor[i] = [old rows, arrivals][source[i]]` for all i, in place.

    No old row is wanted twice, and experts that stay keep their order, so rows move in chains and never in a circle: a
    chain begins at a row that nobody wants, takes the row it comes from, goes on there, and ends with an arrival.
    """
    rows = len(source)
    wanted = {old for old in source if old < rows}
    with torch.no_grad():
        for slot in sorted(set(range(rows)) - wanted):
            while source[slot] < rows:
                tensor[slot].copy_(tensor[source[slot]])
                slot = source[slot]
            tensor[slot].copy_(arrivals[source[slot] - rows])


def _of_parameter(parameter: Tensor, name: str, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: parameter.data}
    if parameter.grad is not None:
        tensors[f"{name}.grad"] = parameter.grad
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        tensors[f"{name}.main_grad"] = main_grad
    state: dict[str, Any] = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for key, value in sorted(state.items()):
        if value is None or isinstance(value, bool | int | float | str):
            continue
        if isinstance(value, Tensor) and value.numel() == 1:
            continue
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            what = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise InputError(
                f"optimizer state {key!r} of {name} {what}: it must be a single number or have "
                f"the parameter's shape {tuple(parameter.shape)}, otherwise it cannot move with an expert"
            )
        tensors[f"{name}.{key}"] = value
    return tensors


def _plain(name: str, tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, Parameter):
        raise InputError(
            f"{name} is a {type(tensor).__name__}: it must be a plain tensor, otherwise its rows cannot move with an "
            "expert"
        )
    return tensor


def local_experts(name: str, tensor: Tensor) -> Tensor:
    """This rank's part of every expert, as a plain tensor that shares memory with it."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(isinstance(placement, Shard) and placement.dim == 0 for placement in tensor.placements):
        raise InputError(f"{name} is sharded over its experts ({tensor.placements}); it must hold whole experts")
    return tensor.to_local()
