"""Who can compute an expert's assignments: its home and its replicas, in the flat order that the splits work on.

A *host* is one (layer, expert, rank). Hosts of all layers lie in one list, sorted by layer, expert and rank, so that
what belongs to one expert is contiguous and sums over experts are `np.add.reduceat`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


def best_host(worth: np.ndarray) -> np.ndarray:
    """Which rank hosts a replica: the one with the greatest worth; of several that are as good, the lowest.

    Args:
        worth: [..., ranks], what it would be worth on each rank.
    Returns: int64 [...].
    """
    return worth.argmax(-1)


@dataclass(frozen=True, eq=False)
class Hosts:
    """H hosts of L layers. Every expert has its home, so no expert and no rank is without a host.

    expert: int64 [H]  layer * E + e, ascending
    rank:   int64 [H]  layer * R + r
    """

    expert: np.ndarray
    rank: np.ndarray
    layers: int
    experts: int
    ranks: int
    gpus_per_node: int

    @staticmethod
    def of(
        home_LE: np.ndarray, layer: np.ndarray, expert: np.ndarray, rank: np.ndarray, gpus_per_node: int, ranks: int
    ) -> "Hosts":
        """Homes, and replicas given as one (layer, expert, rank) each."""
        layers, experts = home_LE.shape
        whole = np.arange(layers * experts)
        key = np.concatenate([whole, layer * experts + expert])
        at = np.concatenate([(home_LE + np.arange(layers)[:, None] * ranks).reshape(-1), layer * ranks + rank])
        order = np.argsort(key * (layers * ranks) + at, kind="stable")
        return Hosts(key[order], at[order], layers, experts, ranks, gpus_per_node)

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [L * E]: each expert's first host."""
        return np.searchsorted(self.expert, np.arange(self.layers * self.experts))

    @cached_property
    def count(self) -> np.ndarray:
        """int64 [L * E]: hosts of each expert."""
        return np.diff(self.first, append=len(self.expert))

    @cached_property
    def by_rank(self) -> np.ndarray:
        """int64 [H]: the hosts, sorted by rank."""
        return np.argsort(self.rank, kind="stable")

    @cached_property
    def first_of_rank(self) -> np.ndarray:
        """int64 [L * R]: where each rank begins in `by_rank`."""
        return np.searchsorted(self.rank[self.by_rank], np.arange(self.layers * self.ranks))

    @cached_property
    def first_of_node(self) -> np.ndarray:
        """int64 [V]: where hosts of one expert on one node begin."""
        node = self.rank // self.gpus_per_node
        return np.flatnonzero(np.diff(self.expert, prepend=-1) | np.diff(node, prepend=-1))

    @cached_property
    def node_group(self) -> np.ndarray:
        """int64 [H]: which of the V groups of `first_of_node` a host is in."""
        return np.repeat(np.arange(len(self.first_of_node)), np.diff(self.first_of_node, append=len(self.expert)))

    def of_rank(self, values_HM: np.ndarray) -> np.ndarray:
        """[L * R, M]: sums over the hosts of every rank."""
        return np.add.reduceat(values_HM[self.by_rank], self.first_of_rank, axis=0)
