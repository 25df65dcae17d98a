"""The expert-parallel group as the planner sees it: nodes, ranks a node, slots."""

from dataclasses import dataclass

import numpy as np

from .errors import InputError

MOST = 512  # nodes, GPUs a node, replica slots a rank: beyond any cluster, and small enough to allocate


@dataclass(frozen=True)
class ClusterSpec:
    """`num_nodes` x `gpus_per_node` ranks; rank r is on node r // gpus_per_node.

    replica_slots: places on a rank for another rank's experts, beside its own.
    """

    num_nodes: int
    gpus_per_node: int
    replica_slots: int = 2

    def __post_init__(self) -> None:
        for name, least in (("num_nodes", 1), ("gpus_per_node", 1), ("replica_slots", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= MOST:
                raise InputError(f"{name} is {value!r}, but must be an integer from {least} to {MOST}")

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def home_slots(self, num_experts: int) -> int:
        """Home slots a rank: E / R, rounded up. An InputError where there are fewer experts than ranks."""
        if num_experts < self.num_ranks:
            raise InputError(
                f"{num_experts} experts are fewer than the {self.num_ranks} ranks ({self.num_nodes} nodes x "
                f"{self.gpus_per_node}): every rank must be home to at least one"
            )
        return -(-num_experts // self.num_ranks)
