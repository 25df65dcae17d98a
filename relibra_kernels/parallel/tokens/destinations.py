"""Which rank and slot computes each assignment of this rank's tokens: on the device, a micro-batch at once.

The host makes tables over experts and ranks from the plan. What walks over tokens is torch, without a synchronisation.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...planner import BatchPlan
from ...planner.splits import split_of_source
from ..comm.devices import upload


class Destinations(NamedTuple):
    """Where assignments go.

    `rank` int64 [L, T, K], -1 where an assignment goes nowhere. `slot` int16 [L, T, K]: the slot on that rank.
    """

    rank: Tensor
    slot: Tensor


def home_slots(plan: BatchPlan) -> np.ndarray:
    """int16 [L, E, R]: slot of each expert on its home, -1 on other ranks. Home slots are in ascending expert order."""
    table = np.full((plan.num_layers, plan.num_experts, plan.num_ranks), -1, np.int16)
    for layer in range(plan.num_layers):
        homes = plan.home_experts(layer)  # [R, home slots], -1 where a slot is empty
        rank, slot = np.nonzero(homes >= 0)
        table[layer, homes[rank, slot], rank] = slot
    return table


def slots_of_experts(plan: BatchPlan, home_slots_LER: np.ndarray, micro_batch: int, first: int = 0) -> np.ndarray:
    """int16 [L, E, R]: slot of each expert on each rank, -1 where the rank has it not. Replica slots come last.

    Args:
        home_slots_LER: of the layers from `first` on.
    """
    table = home_slots_LER.copy()
    replicas = plan.replicas[first : first + len(table), micro_batch]
    layer, rank, slot = np.nonzero(replicas >= 0)
    table[layer, replicas[layer, rank, slot], rank] = plan.home_slots + slot
    return table


def splits_of_source(plan: BatchPlan, loads_LMRE: np.ndarray, micro_batch: int, rank: int) -> np.ndarray:
    """int32 [L, E, R]: how many of this rank's assignments of each expert go to each rank."""
    layers = range(plan.num_layers)
    return np.stack([split_of_source(plan, loads_LMRE, layer, micro_batch, rank) for layer in layers])


def shares_of_experts(plan: BatchPlan, loads_LMRE: np.ndarray | None, layer: int, micro_batch: int) -> np.ndarray:
    """int64 [E, R]: what each rank computes of each expert under the plan; an expert without load is all at home.

    Where the loads are not known, an expert's home and its replicas share alike.
    """
    shares = np.zeros((plan.num_experts, plan.num_ranks), np.int64)
    replicas, quota = plan.replicas[layer, micro_batch], plan.quota[layer, micro_batch]
    rank, slot = np.nonzero(replicas >= 0)
    shares[replicas[rank, slot], rank] = 1 if loads_LMRE is None else quota[rank, slot]
    if loads_LMRE is None:
        shares[np.arange(plan.num_experts), plan.home[layer]] = 1
        return shares
    total = loads_LMRE[layer, micro_batch].sum(0, dtype=np.int64)
    at_home = np.where(total > 0, total - shares.sum(1), 1)
    shares[np.arange(plan.num_experts), plan.home[layer]] = at_home
    return shares


class Placements:
    """Where experts are in each micro-batch of a plan: tables over experts and ranks.

    Args:
        loads_LMRE: what the plan was made for; None: not known.
    """

    def __init__(self, plan: BatchPlan, loads_LMRE: np.ndarray | None, device: torch.device):
        self._plan, self._loads, self._device = plan, loads_LMRE, device
        self._homes = home_slots(plan)

    def slots(self, micro_batch: int) -> np.ndarray:
        """int16 [L, E, R]: slot of each expert on each rank, -1 where it is not there."""
        return slots_of_experts(self._plan, self._homes, micro_batch)

    def share(self, ids_TK: Tensor, layer: int, micro_batch: int) -> Destinations:
        """Where assignments without a split go: to the expert's home and replicas, by their shares. -1: nowhere."""
        shares = upload(shares_of_experts(self._plan, self._loads, layer, micro_batch), self._device)
        slots = upload(
            slots_of_experts(self._plan, self._homes[layer : layer + 1], micro_batch, layer)[0], self._device
        )
        return shared_destinations(ids_TK, shares, slots)


def planned_destinations(ids_LTK: Tensor, split_LER: Tensor, slot_LER: Tensor, num_known: int) -> Destinations:
    """Where every recorded assignment goes: of each expert, in token order and then by k, the first ones to rank 0, as
    many as the split says, the next ones to rank 1, and so on.

    Args:
        ids_LTK: int64 expert ids, -1 where unknown.
        split_LER: int32; its sum over experts and ranks is `num_known` in every layer.
        slot_LER: int16, from `slots_of_experts`.
        num_known: assignments of a layer that are known.
    """
    layers, experts, ranks = split_LER.shape
    flat_LA = ids_LTK.flatten(1)
    # Sorted by expert (stably), occurrences lie as the split does when it is read expert by expert, rank by rank.
    key_LA = torch.where(flat_LA < 0, experts, flat_LA).to(_key_type(experts))  # unknown ones last
    order_LA = key_LA.argsort(dim=1, stable=True)[:, :num_known]
    of_rank = torch.arange(ranks, device=ids_LTK.device).repeat(layers * experts)
    sorted_LA = of_rank.repeat_interleave(split_LER.reshape(-1), output_size=layers * num_known).view(layers, num_known)
    rank_LA = torch.full_like(flat_LA, -1).scatter_(1, order_LA, sorted_LA)
    return _with_slots(ids_LTK, rank_LA.view_as(ids_LTK), slot_LER)


def shared_destinations(ids_TK: Tensor, share_ER: Tensor, slot_ER: Tensor) -> Destinations:
    """Where assignments without a split go: each expert's are dealt out to its home and replicas by their shares.

    Args:
        ids_TK: int64, -1 where a choice goes nowhere. share_ER: int64, from `shares_of_experts`.
    """
    experts, ranks = share_ER.shape
    flat_A = ids_TK.reshape(-1)
    key_A = torch.where(flat_A < 0, experts, flat_A)
    count_E = torch.zeros(experts + 1, dtype=torch.int64, device=key_A.device)
    count_E = count_E.scatter_add_(0, key_A, torch.ones_like(key_A))[:experts]
    before_ER = share_ER.cumsum(1)
    until_ER = count_E[:, None] * before_ER // before_ER[:, -1:]
    split_ER = until_ER.diff(dim=1, prepend=until_ER.new_zeros(experts, 1))
    nowhere = ids_TK.numel() - count_E.sum()
    split = torch.cat([split_ER.reshape(-1), nowhere[None]])
    of_rank = torch.cat([torch.arange(ranks, device=key_A.device).repeat(experts), key_A.new_full((1,), -1)])
    sorted_A = of_rank.repeat_interleave(split, output_size=flat_A.numel())
    order_A = key_A.to(_key_type(experts)).argsort(stable=True)
    rank_TK = torch.empty_like(flat_A).scatter_(0, order_A, sorted_A).view_as(ids_TK)
    found = _with_slots(ids_TK[None], rank_TK[None], slot_ER[None])
    return Destinations(found.rank[0], found.slot[0])


def _with_slots(ids_LTK: Tensor, rank_LTK: Tensor, slot_LER: Tensor) -> Destinations:
    layers, _, ranks = slot_LER.shape
    place_LTK = ids_LTK.clamp(min=0) * ranks + rank_LTK.clamp(min=0)
    slot_LTK = slot_LER.view(layers, -1).gather(1, place_LTK.flatten(1)).view_as(ids_LTK)
    return Destinations(rank_LTK, slot_LTK.masked_fill(rank_LTK < 0, -1))


def _key_type(experts: int) -> torch.dtype:
    """The narrowest integers that hold experts and one more: they sort fastest."""
    return torch.uint8 if experts < 255 else torch.int16
