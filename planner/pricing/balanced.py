"""Routing forced to be balanced: every expert gets the same. No policy, since it changes
the model, but a lower bound for the time of one."""

import numpy as np

from ..cluster import ClusterSpec
from .outcome import Outcome


def forced_balanced(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    """Every rank gets the same, in E / R slots, rounded up."""
    layers, micro_batches, experts = table_LME.shape
    ranks, slots = cluster.num_ranks, cluster.home_slots(experts)
    total = table_LME.sum(2)[:, :, None]
    # What does not divide goes to the first slots of all ranks in turn.
    even = total // (ranks * slots) + (np.arange(ranks * slots) < total % (ranks * slots))
    return Outcome.of(even.reshape(layers, micro_batches, slots, ranks).swapaxes(2, 3))
