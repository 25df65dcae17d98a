"""Routing forced to be balanced: every expert gets the same. Not a policy (it changes the model) but the bound."""

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.outcome import Outcome


def forced_balanced(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers, micro_batches, experts = table_LME.shape
    cluster.experts_per_rank(experts)
    total = table_LME.sum(2, keepdims=True)
    even = total // experts + (np.arange(experts) < total % experts)
    # What does not divide goes to the first experts of all ranks in turn.
    return Outcome.of(even.reshape(layers, micro_batches, -1, cluster.num_ranks).swapaxes(2, 3))
