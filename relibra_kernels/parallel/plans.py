"""Plans of one or several expert-parallel groups, and the loads that were gathered for them."""

from dataclasses import dataclass, replace

import numpy as np

from ..planner import BatchPlan, ClusterSpec, RoutingTrace, plan_batch


@dataclass(frozen=True)
class CountedLoads:
    """The load table that `plan` gathered, for the batch that follows it."""

    trace: RoutingTrace
    groups: np.ndarray
    loads: np.ndarray

    def fits(self, trace: RoutingTrace, groups: np.ndarray, plan: BatchPlan) -> bool:
        same = trace is self.trace and np.array_equal(groups, self.groups)
        return same and plan.num_micro_batches == self.loads.shape[1]


def plan_group(
    loads_GLMRE: np.ndarray, group: int, cluster: ClusterSpec, home: np.ndarray, model_name: str
) -> BatchPlan:
    """The plan of one of several groups: their micro-batches are planned together, so that they share one `home`."""
    groups, _, micro_batches = loads_GLMRE.shape[:3]
    together = np.concatenate(list(loads_GLMRE), axis=1)  # [L, groups * M, R, E]
    plan = plan_batch(together, cluster, previous_home=home, model=model_name)
    if groups == 1:
        return plan
    own = slice(group * micro_batches, (group + 1) * micro_batches)
    return replace(
        plan,
        replicas=plan.replicas[:, own],
        quota=plan.quota[:, own],
        loads_sha256="",
        loads=loads_GLMRE[group],
    )
