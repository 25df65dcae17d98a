"""Rival policies, written from what their authors describe. Each takes the loads of a whole batch (an oracle, where the
original would have to predict) and a cluster, and says what it makes of them as an Outcome. Where a rival keeps copies
inside a node for a whole batch, those are not priced: once a batch over the fast network is nothing beside the rest.
"""

from collections.abc import Callable

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.outcome import Outcome
from .balanced import forced_balanced
from .eplb import eplb_global, eplb_hierarchical
from .least_loaded import least_loaded
from .lplb import lplb
from .relibra_paper import relibra_paper
from .static import static

Policy = Callable[[np.ndarray, ClusterSpec], Outcome]

BASELINES: dict[str, Policy] = {
    "static": static,
    "eplb-global": eplb_global,
    "eplb-hierarchical": eplb_hierarchical,
    "lplb": lplb,
    "least-loaded": least_loaded,
    "relibra-paper": relibra_paper,
    "balanced": forced_balanced,
}

__all__ = ["BASELINES", "Policy", *sorted(f.__name__ for f in BASELINES.values())]
