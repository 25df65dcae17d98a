"""Inter-batch reordering: experts move to the rank that the next plan calls their home, with everything that is theirs.

What moves for each expert is one row of every tensor that has the shape of the expert parameter: the weights, the
optimizer's moments, gradients that are still held. Layer by layer: stage the new rows, let every rank confirm, then
swap; so a failure leaves each layer either wholly moved or untouched, and `home` says which.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..planner.errors import InputError
from .comm import Comm


def expert_tensors(parameter: Parameter, name: str, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Every tensor that belongs to the experts of `parameter` [E/R, ...], by name, in a fixed order.

    Raises: InputError for optimizer state that is neither of the parameter's shape nor a single number, since it cannot
        be split by expert.
    """
    tensors = {name: parameter.data}
    if parameter.grad is not None:
        tensors[f"{name}.grad"] = parameter.grad
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        tensors[f"{name}.main_grad"] = main_grad
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for key, value in sorted(state.items()):
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.shape != parameter.shape:
            raise InputError(
                f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}: it must be a single number or have "
                f"the parameter's shape {tuple(parameter.shape)}, otherwise it cannot move with an expert"
            )
        tensors[f"{name}.{key}"] = value
    return tensors


def move_experts(
    comm: Comm, tensors: dict[str, Tensor], old_home: np.ndarray, new_home: np.ndarray, where: str
) -> None:
    """Move one layer's experts from `old_home` [E] to `new_home` [E], in place in every tensor [E/R, ...].

    Home slots hold a rank's experts in ascending order, before and after. Collective; memory: one copy of this
    layer's tensors. Every rank must bring the same
    tensors, by name.
    """
    if np.array_equal(old_home, new_home):
        return
    before = [np.flatnonzero(old_home == rank) for rank in range(comm.size)]
    after = [np.flatnonzero(new_home == rank) for rank in range(comm.size)]
    me = comm.rank
    leaving = [np.flatnonzero((old_home == me) & (new_home == r) & (r != me)) for r in range(comm.size)]
    arriving = [np.flatnonzero((old_home == r) & (new_home == me) & (r != me)) for r in range(comm.size)]
    send_counts, receive_counts = [len(experts) for experts in leaving], [len(experts) for experts in arriving]
    send_slots = np.searchsorted(before[me], np.concatenate(leaving))
    kept = np.intersect1d(before[me], after[me])
    # rows of the new tensor, taken from [kept rows, arrivals]
    source = np.argsort(np.concatenate([kept, *arriving]), kind="stable")

    staged = {}
    for name, tensor in tensors.items():
        send = tensor.index_select(0, torch.from_numpy(send_slots).to(tensor.device))
        received = comm.exchange(send, send_counts, receive_counts, "migration", f"{where}, moving {name}")
        stay = tensor.index_select(0, torch.from_numpy(np.searchsorted(before[me], kept)).to(tensor.device))
        staged[name] = torch.cat([stay, received]).index_select(0, torch.from_numpy(source).to(tensor.device))
    confirmed = torch.ones(1, device=next(iter(tensors.values())).device)
    comm.all_reduce(confirmed, f"{where}, confirming")
    for name, tensor in tensors.items():
        tensor.copy_(staged[name])
