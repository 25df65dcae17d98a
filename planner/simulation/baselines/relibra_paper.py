"""ReLibra as its paper has it: experts reordered between batches, replicas inside the node, no guests.

The paper anneals over swaps; here the same moves descend until none helps. Its replicas come from a greedy search with
a MILP for the split; here from our own search, which is at least as good. So this is a generous reading of it.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...options import PlanOptions
from ...planning import plan_batch
from ...pricing.outcome import Outcome, outcome_of_plan


def relibra_paper(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    plan = plan_batch(table_LME, cluster, options=PlanOptions(max_guests=0))
    return outcome_of_plan(plan, table_LME)
