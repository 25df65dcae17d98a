"""Who can compute an expert's assignments: its home and its replicas, in the flat order that the splits work on.

A *host* is one (layer, expert, rank). Hosts of all layers lie in one list, sorted by layer, expert and rank, so that
what belongs to one expert is contiguous and sums over experts are `np.add.reduceat`.
"""

from dataclasses import dataclass, replace
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
    def first_of_node(self) -> np.ndarray:
        """int64 [V]: where hosts of one expert on one node begin."""
        node = self.rank // self.gpus_per_node
        return np.flatnonzero(np.diff(self.expert, prepend=-1) | np.diff(node, prepend=-1))

    @cached_property
    def node_group(self) -> np.ndarray:
        """int64 [H]: which of the V groups of `first_of_node` a host is in."""
        return np.repeat(np.arange(len(self.first_of_node)), np.diff(self.first_of_node, append=len(self.expert)))

    @cached_property
    def by_expert(self) -> "Sums":
        """Sums [L * E, ...] over the hosts of every expert."""
        return Sums.by(self.expert, self.layers * self.experts)

    @cached_property
    def by_rank(self) -> "Sums":
        """Sums [L * R, ...] over the hosts of every rank."""
        return Sums.by(self.rank, self.layers * self.ranks)

    @cached_property
    def nodes(self) -> "Hosts":
        """The V groups of `first_of_node` as hosts: each node taken for one rank."""
        start = self.first_of_node
        whole = self.ranks // self.gpus_per_node
        return Hosts(self.expert[start], self.rank[start] // self.gpus_per_node, self.layers, self.experts, whole, 1)

    def some(self, chosen: np.ndarray) -> "Hosts":
        """A part of the hosts, under the same numbers. chosen: bool [H]."""
        return replace(self, expert=self.expert[chosen], rank=self.rank[chosen])

    def of_layers(self, layers: np.ndarray) -> tuple["Hosts", np.ndarray]:
        """The hosts of some layers alone, numbered anew, and which of all they are."""
        new = np.full(self.layers, -1)
        new[layers] = np.arange(len(layers))
        to = new[self.expert // self.experts]
        chosen = np.flatnonzero(to >= 0)
        expert = self.expert[chosen] % self.experts + to[chosen] * self.experts
        rank = self.rank[chosen] % self.ranks + to[chosen] * self.ranks
        return replace(self, expert=expert, rank=rank, layers=len(layers)), chosen


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of rows with the same key, each added up in the order of the rows, so that every machine gets the same bits.

    turns: for i = 0, 1, ...: keys with more than i rows, and the i-th row of each.
    """

    size: int
    turns: list[tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def by(key: np.ndarray, size: int) -> "Sums":
        """key: int64 [rows], each below `size`."""
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        turn = np.arange(len(key)) - np.searchsorted(ordered, ordered)
        by_turn = np.argsort(turn, kind="stable")
        parts = np.split(by_turn, np.cumsum(np.bincount(turn))[:-1])
        return Sums(size, [(ordered[part], order[part]) for part in parts])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[size, ...] from [rows, ...]; 0 where a key has no row."""
        out = np.zeros((self.size, *rows.shape[1:]), rows.dtype)
        for key, which in self.turns:
            out[key] += rows[which]
        return out
