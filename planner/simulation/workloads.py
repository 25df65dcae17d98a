"""Generated routing by the names that others use for theirs.

drift        log-normal popularity that drifts, calibrated to published statistics (`generator.py`)
zipf         UltraEP's: popularity falls as 1 / rank, ranks shuffled in every layer and a fifth of them anew in every
             micro-batch
max-violation  MoonEP's: the hottest expert has `max_mean` times the mean, all others share the rest alike; which is
             hottest changes from micro-batch to micro-batch
skewed       Megatron's: a quarter of the experts gets three quarters of the load, the same ones for the whole batch
"""

import numpy as np

from .generator import generate_loads

WORKLOADS = ("drift", "zipf", "max-violation", "skewed")


def workload(
    name: str,
    layers: int,
    micro_batches: int,
    experts: int,
    top_k: int,
    tokens: int,
    *,
    max_mean: float = 7.3,
    seed: int = 0,
) -> np.ndarray:
    """int32 [L, M, E]: loads of micro-batches of `tokens` tokens over all ranks. `max_mean` shapes drift and
    max-violation."""
    if name == "drift":
        return generate_loads(layers, micro_batches, experts, top_k, tokens, max_mean=max_mean, seed=seed)
    rng = np.random.default_rng([seed, 2])
    shape = layers, micro_batches, experts
    if name == "zipf":
        order = np.argsort(rng.random((layers, 1, experts)), axis=2) + np.zeros(shape, np.int64)
        for m in range(1, micro_batches):
            fresh = rng.random((layers, experts)) < 0.2
            key = np.where(fresh, rng.random((layers, experts)) * experts, order[:, m - 1])
            order[:, m] = np.argsort(np.argsort(key, axis=1), axis=1)
        weight = 1.0 / (order + 1)
    elif name == "max-violation":
        top = min(max_mean, experts / top_k)
        weight = np.full(shape, (experts - top) / (experts - 1))
        hottest = rng.integers(0, experts, (layers, micro_batches, 1))
        np.put_along_axis(weight, hottest, top, 2)
    else:
        hot = np.argsort(rng.random((layers, 1, experts)), axis=2) < max(experts // 4, 1)
        weight = np.where(hot, 9.0, 1.0) + np.zeros(shape)
    share = np.minimum(weight / weight.sum(2, keepdims=True) * top_k, 1.0)
    return rng.binomial(tokens, share).astype(np.int32)
