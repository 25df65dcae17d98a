"""Tokens of a batch that are routed live: where they go, beside recorded ones."""

from types import SimpleNamespace

import numpy as np
import torch

from relibra_kernels.parallel.microbatch import MicroBatch
from relibra_kernels.parallel.tokens.destinations import Destinations, Placements
from relibra_kernels.planner import ClusterSpec, static_plan


def test_live_tokens_are_shared_apart_from_recorded_ones():
    """Expert 0 has a copy on each of two ranks, which share its 12 recorded tokens: so they share the 4 live ones."""
    loads = np.zeros((1, 1, 2, 4), np.int32)
    loads[0, 0, 0, 0] = 12
    plan = static_plan(loads, ClusterSpec(1, 2, 1))
    plan.replicas[0, 0, 1, 0], plan.quota[0, 0, 1, 0] = 0, 6
    tokens, live = 16, torch.arange(16) >= 12
    recorded = Destinations(torch.full((1, tokens, 1), 7), torch.full((1, tokens, 1), 3, dtype=torch.int16))
    placements = Placements(plan, loads, torch.device("cpu"))
    of_batch = SimpleNamespace(_parts=SimpleNamespace(placements=placements), _destinations=recorded, index=0)
    rank, slot = MicroBatch._mixed(of_batch, 0, torch.zeros(tokens, 1, dtype=torch.int64), live)
    assert rank[:12].eq(7).all() and slot[:12].eq(3).all()
    assert rank[12:, 0].tolist() == [0, 0, 1, 1] and slot[12:, 0].tolist() == [0, 0, 2, 2]
