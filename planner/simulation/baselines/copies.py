"""Baselines that copy experts for a whole batch: from instances of experts on ranks, and their split, to an Outcome.

An instance on the expert's contiguous home is the home. Every other one counts as a kept replica, also where the
baseline moves the expert away from its home altogether. That is generous: moving it would carry the optimizer state
along.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...plan import contiguous_home
from ...pricing.outcome import Outcome, kept_transfers, local_assignments
from ...solver.exact import PairFlow
from ...solver.hosts import Hosts
from ...solver.relaxed import relaxed_split, whole_split
from ...transfers import kept_sources

_ROUNDS, _SWEEPS = 32, 30


def outcome_of_instances(
    table_LME: np.ndarray, expert_LRP: np.ndarray, cluster: ClusterSpec, *, best_split: bool, extra_slots: int
) -> Outcome:
    """expert_LRP: the expert of every instance, -1 for none; one twice on a rank is one with two parts.

    best_split: split for every micro-batch so that the busiest rank does least; else all instances do the same.
    extra_slots: places a rank beside E / R, which is what its memory is counted as.
    """
    layers, micro_batches, experts = table_LME.shape
    ranks, gpus = cluster.num_ranks, cluster.gpus_per_node
    home = contiguous_home(layers, experts, ranks)
    layer, rank, place = np.nonzero(expert_LRP >= 0)
    expert = expert_LRP[layer, rank, place]
    key, parts = np.unique((layer * experts + expert) * ranks + rank, return_counts=True)
    which, rank = np.divmod(key, ranks)
    hosts = Hosts(which, which // experts * ranks + rank, layers, experts, ranks, gpus)
    load = np.ascontiguousarray(table_LME.swapaxes(1, 2), np.float64).reshape(-1, micro_batches)
    prior = parts[:, None] * np.ones(micro_batches)
    if best_split:
        split = relaxed_split(hosts, load, prior, _ROUNDS, 1e-3)
        split = whole_split(hosts, split, load)
        level_all(hosts, split, table_LME)
    else:
        even = prior * (load / hosts.by_expert(prior))[hosts.expert]
        split = whole_split(hosts, even, load)

    width = int(np.bincount(hosts.rank, minlength=layers * ranks).max())
    by_rank = np.argsort(hosts.rank, kind="stable")
    slot = np.empty(len(key), np.int64)
    slot[by_rank] = np.arange(len(key)) - np.searchsorted(hosts.rank[by_rank], hosts.rank[by_rank])
    layer, expert = np.divmod(hosts.expert, experts)
    slot_load = np.zeros((layers, micro_batches, ranks, width), np.int64)
    slot_load[layer, :, rank, slot] = split
    held = np.full((layers, ranks, width), -1, np.int64)
    held[layer, rank, slot] = expert
    wanted = (table_LME / cluster.num_nodes)[:, :, None]
    everywhere = np.broadcast_to(held[:, None], slot_load.shape)
    local = local_assignments(everywhere, slot_load, wanted, gpus)
    kept = (held >= 0) & (home[np.arange(layers)[:, None, None], np.maximum(held, 0)] != np.arange(ranks)[:, None])
    sources = kept_sources(home, np.where(kept, held, -1)[:, None], kept, gpus)
    counts = kept_transfers(sources, gpus)
    return Outcome.of(slot_load, local, kept_copies=np.full(ranks, layers * extra_slots), **counts)


def level_all(hosts: Hosts, split_HM: np.ndarray, table_LME: np.ndarray) -> None:
    """Exact splits, in place, of every layer and micro-batch, as far as a few sweeps go."""
    layers, micro_batches, experts = table_LME.shape
    several = np.flatnonzero(hosts.count[hosts.expert] > 1)
    if not len(several):
        return
    size = len(several) * micro_batches
    layer = np.repeat(hosts.expert[several] // experts, micro_batches)
    micro_batch = np.tile(np.arange(micro_batches), len(several))
    pair = layer * micro_batches + micro_batch
    expert = pair * experts + np.repeat(hosts.expert[several] % experts, micro_batches)
    rank = pair * hosts.ranks + np.repeat(hosts.rank[several] % hosts.ranks, micro_batches)
    order = np.argsort(expert * hosts.ranks + rank % hosts.ranks, kind="stable")
    load = hosts.by_rank(split_HM).reshape(layers, hosts.ranks, micro_batches).swapaxes(1, 2).reshape(-1)
    value = split_HM[several].reshape(size)
    flow = PairFlow(expert[order], rank[order], value[order], load.copy(), experts, hosts.ranks)
    flow.level(-(-table_LME.sum(2) // hosts.ranks).reshape(-1), _SWEEPS)
    value[order] = flow.split
    split_HM[several] = value.reshape(len(several), micro_batches)
