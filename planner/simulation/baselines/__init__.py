"""Baseline policies, written from what their authors describe.

Each takes the loads of a whole batch (an oracle, where the original would have to predict) and a cluster, and says what
it makes of them as an Outcome.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ...cluster import ClusterSpec
from ...pricing.balanced import forced_balanced
from ...pricing.outcome import Outcome
from .eplb import eplb_global, eplb_hierarchical
from .flashlb import flashlb
from .lplb import lplb
from .relibra_paper import relibra_paper
from .spill import llep, moonep, ultraep
from .static import static

Policy = Callable[[np.ndarray, ClusterSpec], Outcome]

BASELINES: dict[str, Policy] = {
    "static": static,
    "eplb-global": eplb_global,
    "eplb-global-split": partial(eplb_global, split=True),
    "eplb-hierarchical": eplb_hierarchical,
    "eplb-hierarchical-split": partial(eplb_hierarchical, split=True),
    "flashlb-split": flashlb,
    "lplb": lplb,
    "llep": llep,
    "ultraep": ultraep,
    "moonep": moonep,
    "relibra-paper": relibra_paper,
    "balanced": forced_balanced,
}

__all__ = ["BASELINES", "Policy"]
