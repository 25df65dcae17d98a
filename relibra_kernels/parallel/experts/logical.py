"""Experts in logical order [E, ...], whatever the placement: gathered, or as a checkpoint sees them."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ...nn import ReplicatedMoE
from ..comm.collectives import Comm
from .adapters import Factor
from .migration import local_experts
from .parameters import expert_parameters


def layer_of_parameter(layers: Sequence[ReplicatedMoE]) -> dict[int, int]:
    """MoE layer of every expert parameter, by its id."""
    return {id(p): layer for layer, moe in enumerate(layers) for _, p in expert_parameters(moe.experts)}


def factor_of_parameter(layers: Sequence[ReplicatedMoE]) -> dict[int, Factor]:
    """The factor of every parameter of an adapter, by its id."""
    return {id(factor.linear.weight): factor for moe in layers for factor in moe.experts.adapters}


def logical_tensors(
    model: nn.Module,
    layers: Sequence[ReplicatedMoE],
    home_LE: np.ndarray,
    comm: Comm,
    tensor_of: Callable[[nn.Parameter], Tensor | None],
    names: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """(name in the whole model, `tensor_of(parameter)`) of every parameter, gathered one at a time. Collective.

    Args:
        names: of those that are wanted; None: all.
    """
    layer_of, factors = layer_of_parameter(layers), factor_of_parameter(layers)

    def whole(name: str, parameter: nn.Parameter) -> Tensor | None:
        tensor = tensor_of(parameter)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if tensor is None or id(parameter) not in layer_of:
            return tensor
        factor = factors.get(id(parameter))
        rows = tensor if factor is None else factor.by_expert(tensor).contiguous()
        gathered = gather_experts(rows, home_LE[layer_of[id(parameter)]], comm, f"gathering {name}")
        return gathered if factor is None else factor.whole(gathered)

    for name, parameter in model.named_parameters():
        if names is None or name in names:
            yield name, whole(name, parameter)  # of which nothing is left here when the next is gathered


def gather_experts(rows: Tensor, home_E: np.ndarray, comm: Comm, phase: str) -> Tensor:
    """[E, ...] from the rows of every rank's home slots, some slots of all ranks at a time. Collective.

    It takes an eighth of the result's memory besides, or one expert of each rank.
    """
    whole = rows.new_empty((len(home_E), *rows.shape[1:]))
    row_of_expert = _row_of_expert(home_E, len(rows))
    rank, slot = np.divmod(row_of_expert, len(rows))
    step = -(-len(rows) // 8)
    for first in range(0, len(rows), step):
        part = comm.gather_tensors(rows[first : first + step], phase)
        expert = np.flatnonzero((slot >= first) & (slot < first + step))
        index = (torch.from_numpy(array).to(rows.device) for array in (expert, rank[expert], slot[expert] - first))
        to, of_rank, of_slot = index
        whole[to] = part[of_rank, of_slot]
    return whole


def _row_of_expert(home_E: np.ndarray, home_slots: int) -> np.ndarray:
    """int64 [E]: the row of each expert where the home slots of all ranks stand one after the other."""
    order = np.argsort(home_E, kind="stable")
    first = np.searchsorted(home_E[order], np.arange(home_E.max() + 1))
    rows = np.empty(len(home_E), np.int64)
    rows[order] = home_E[order] * home_slots + np.arange(len(order)) - first[home_E[order]]
    return rows


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
