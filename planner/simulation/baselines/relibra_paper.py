"""ReLibra as its paper has it: experts reordered between batches, replicas fetched inside the node, none kept.

The paper places experts by simulated annealing over swaps; here swaps that help are taken until none does. It finds
replicas by a greedy search with a MILP for the split; here our own search with an exact split does. Both make this
baseline at least as good as its original.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...plan import BatchPlan, contiguous_home
from ...pricing.outcome import Outcome, outcome_of_plan
from ...solver.fetched import FetchPrice
from ...solver.kept import KeptReplicas
from ...solver.placement import WORTH_MOVING, place
from ...solver.solution import Effort, solve, target_load

_EFFORT = Effort(rounds=0, node_rounds=0, sweeps=0, slack=1 / 1024, within=None)


def relibra_paper(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers, _, experts = table_LME.shape
    before = contiguous_home(layers, experts, cluster.num_ranks)
    home = before
    if experts % cluster.num_ranks == 0:
        home = place(
            table_LME,
            cluster.num_nodes,
            cluster.gpus_per_node,
            previous_home=before,
            polish=True,
            worth=WORTH_MOVING / 64,
        )
    wanted = (table_LME / cluster.num_nodes)[:, :, None]
    target = target_load(table_LME, cluster.num_ranks, None, _EFFORT.slack)
    whatever = FetchPrice(cluster.replica_slots, 1.0, 1e-6, 1e-6)
    found = solve(table_LME, wanted, home, KeptReplicas.none(), cluster, target, _EFFORT, whatever)
    plan = BatchPlan(found.home, found.replicas, found.quota, found.kept, cluster.gpus_per_node)
    return outcome_of_plan(plan, table_LME, before)
