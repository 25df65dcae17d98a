"""Megatron-LM: contiguous homes, nothing moves."""

import numpy as np

from ...cluster import ClusterSpec
from ...plan import static_plan
from ...pricing.outcome import Outcome, outcome_of_plan


def static(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    return outcome_of_plan(static_plan(table_LME, cluster), table_LME)
