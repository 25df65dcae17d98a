"""ReLibra as its paper has it: experts reordered between batches, replicas inside the node, no guests.

The paper anneals over swaps; here the same moves descend until none helps. Its replicas come from a greedy search with
a MILP for the split; here from our own search, which is at least as good. So this is a generous reading of it.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...planning import search_plan
from ...pricing.outcome import Outcome, outcome_of_plan
from ...solver.effort import SearchOptions


def relibra_paper(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    plan = search_plan(table_LME, cluster, SearchOptions(max_kept=0))
    return outcome_of_plan(plan, table_LME)
