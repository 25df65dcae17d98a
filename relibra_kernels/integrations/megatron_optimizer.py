"""Megatron's optimizers as `ep.batch` takes them: the state that moves with the experts.

The distributed optimizer spreads fp32 masters and moments over the copies of the experts (`expt_dp`), in flat ranges
that know no experts. Where experts of a layer move, its state is put together over the copies, moved, and taken apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

__all__ = ["torch_optimizer"]


def torch_optimizer(optimizer: Any) -> Any:
    """What `ep.batch` takes of Megatron's optimizer, distributed or not, chained or not."""
    return _Optimizers(getattr(optimizer, "chained_optimizers", [optimizer]))


class _Optimizers:
    """The states of several optimizers as if they were one's; what is spread is in `gather`, not in `state`."""

    def __init__(self, optimizers: Sequence[Any]):
        distributed = [one for one in optimizers if isinstance(one, DistributedOptimizer)]
        self._spread = [(one, [p for buffer in one.buffers for p in buffer.params]) for one in distributed]
        self._whole = [one.optimizer for one in optimizers if not isinstance(one, DistributedOptimizer)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        spread = [{"params": parameters} for _, parameters in self._spread]
        return [*(group for one in self._whole for group in one.param_groups), *spread]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {key: value for one in self._whole for key, value in one.state.items()}

    def gather(self, parameter: Tensor) -> "SpreadState | None":
        """The spread state of a parameter; None where it is not of a distributed optimizer. Collective."""
        for one, parameters in self._spread:
            if any(parameter is known for known in parameters):
                return SpreadState(one, parameter)
        return None


class SpreadState:
    """fp32 master and moments of one parameter, put together over the copies: `tensors`, each of its shape."""

    def __init__(self, optimizer: Any, parameter: Tensor):
        group = optimizer.data_parallel_group
        self._own: dict[str, Tensor] = {}
        self._range = slice(0, 0)
        if parameter in optimizer.model_param_group_index_map:  # else others have all of it
            found = optimizer._get_main_param_and_optimizer_states(parameter)
            own = {name: t for name, t in found.items() if isinstance(t, Tensor) and t.numel() > 1}
            if parameter.dtype == torch.float32:
                own.pop("param", None)  # the parameter itself
            self._own = dict(sorted(own.items()))
            place = optimizer._get_model_param_range_map(parameter)["param"]
            self._range = slice(place.start, place.end)
        names: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(names, {name: tensor.dtype for name, tensor in self._own.items()}, group=group)
        known = {name: dtype for one in names for name, dtype in one.items()}
        self.tensors: dict[str, Tensor] = {}
        for name in sorted(known):
            whole = torch.zeros(parameter.numel(), dtype=known[name], device=parameter.device)
            if name in self._own:
                whole[self._range] = self._own[name].reshape(-1)
            dist.all_reduce(whole, group=group)  # zeros but for one copy
            self.tensors[name] = whole.view(parameter.shape)

    def scatter(self) -> None:
        """Put this rank's ranges back where they came from."""
        for name, own in self._own.items():
            own.copy_(self.tensors[name].reshape(-1)[self._range].view_as(own))
