"""A plan as no planner makes it: random homes, replicas and quotas, so that everything moves."""

from dataclasses import replace

import numpy as np

from relibra_kernels.planner import BatchPlan, ClusterSpec, plan_batch


def shuffled_plan(loads_LMRE: np.ndarray, cluster: ClusterSpec, seed: int, keep: bool = True) -> BatchPlan:
    """Random homes, kept replicas of any node in every slot (or fetched ones of their own), random quotas."""
    random = np.random.default_rng(seed)
    loads = loads_LMRE.sum(2)
    layers, _, experts = loads.shape
    ranks, slots = cluster.num_ranks, cluster.replica_slots
    empty = plan_batch(np.zeros_like(loads), cluster)
    home = np.stack([random.permutation(np.sort(np.arange(experts) % ranks)) for _ in range(layers)])
    replicas, quota = np.full_like(empty.replicas, -1), np.zeros_like(empty.quota)
    kept = np.zeros_like(empty.kept)
    for layer in range(layers):
        for rank in range(ranks):
            near = keep | (home[layer] // cluster.gpus_per_node == rank // cluster.gpus_per_node)
            for slot, expert in enumerate(random.permutation(np.flatnonzero((home[layer] != rank) & near))[:slots]):
                kept[layer, rank, slot] = keep
                replicas[layer, :, rank, slot] = expert
    left = loads.copy()
    for layer, m, rank, slot in np.ndindex(replicas.shape):
        expert = replicas[layer, m, rank, slot]
        if expert >= 0:
            quota[layer, m, rank, slot] = random.integers(0, left[layer, m, expert] + 1)
            left[layer, m, expert] -= quota[layer, m, rank, slot]
    return replace(
        empty, home=home, replicas=replicas, quota=quota, kept=kept, loads_sha256="", model="toy", loads=loads
    )
