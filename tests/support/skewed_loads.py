"""Load tables with the skew of real routing, for tests of the planner."""

import numpy as np


def skewed_loads(layers, micro_batches, experts, seed=0, sigma=1.2, mean=1000):
    """int64 [L, M, E]: log-normal popularity that drifts from one micro-batch to the next."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, sigma / 3, (layers, micro_batches, experts))
    popularity = np.exp(rng.normal(0, sigma, (layers, 1, experts)) + noise)
    return (popularity / popularity.sum(2, keepdims=True) * mean * experts).astype(np.int64)
