"""LLEP (Salesforce): for every micro-batch, hot experts spill from their own rank to the least loaded ones.

Experts in descending order of load; what the rank has above its capacity goes, in chunks of at least 1024 assignments,
to the rank with the least, on any node, which fetches the weights for this micro-batch and returns the gradient. A
micro-batch whose max/mean is below 1.3 is left as it is.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.outcome import Outcome

_CHUNK = 1024
_BYPASS = 1.3


def least_loaded(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers, micro_batches, experts = table_LME.shape
    ranks, gpus = cluster.num_ranks, cluster.gpus_per_node
    size = cluster.experts_per_rank(experts)
    left = table_LME.reshape(-1, experts).copy()  # [X, E]
    load = left.reshape(len(left), ranks, size).sum(2)
    foreign = np.zeros_like(load)
    counts = {name: np.zeros_like(load) for name in ("pushed_in", "pushed_out", "far_in", "far_out")}
    capacity = -(-load.sum(1) // ranks)
    busy = np.flatnonzero(load.max(1) >= _BYPASS * np.maximum(load.mean(1), 1e-9))
    order = np.argsort(-left, axis=1, kind="stable")
    for position in range(experts):
        active, expert = busy, order[busy, position]
        while len(active):
            home = expert // size
            host = load[active].argmin(1)
            excess = np.minimum(left[active, expert], load[active, home] - capacity[active])
            amount = np.minimum(excess, capacity[active] - load[active, host])
            go = (amount >= np.minimum(_CHUNK, excess)) & (excess >= _CHUNK) & (host != home)
            active, expert, home, host, amount = (x[go] for x in (active, expert, home, host, amount))
            left[active, expert] -= amount
            load[active, home] -= amount
            load[active, host] += amount
            foreign[active, host] += amount
            near = home // gpus == host // gpus
            for name, rank in (("pushed_in", host), ("pushed_out", home)):
                counts[name][active[near], rank[near]] += 1
            for name, rank in (("far_in", host), ("far_out", home)):
                counts[name][active[~near], rank[~near]] += 1
    shape = (layers, micro_batches, ranks)
    slot_load = np.concatenate([left.reshape(*shape, size), foreign.reshape(*shape, 1)], 3)
    return Outcome.of(slot_load, **{name: count.reshape(shape) for name, count in counts.items()})
