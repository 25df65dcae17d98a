import numpy as np
import pytest

from relibra_kernels.planner import RoutingTrace


@pytest.fixture
def small_trace():
    """Four experts, two layers, 1000 tokens; expert 0 is hot in the first layer, expert 3 in the second."""
    random = np.random.default_rng(0)
    first = random.choice(4, (1000, 1), p=[0.7, 0.15, 0.1, 0.05])
    second = random.choice(4, (1000, 1), p=[0.1, 0.1, 0.1, 0.7])
    ids = np.stack([first, second], axis=1).astype(np.int8)
    ids[-1] = -1
    return RoutingTrace(ids, np.array([0, 1000]), 4, (0, 1))
