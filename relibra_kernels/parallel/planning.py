"""The loads of an expert-parallel group, counted once for a plan and the batch that follows it, and plans from them."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np

from ..nn import ReplicatedMoE
from ..planner import BatchPlan, ClusterSpec, RoutingTrace, count_loads, plan_batch
from ..planner.errors import ReLibraError
from .checks import check_trace
from .comm.groups import Groups
from .experts.parameters import device_of


class Planning:
    """Counts the loads of this rank's group, and plans from those of all groups."""

    def __init__(
        self, layers: Sequence[ReplicatedMoE], num_experts: int, groups: Groups, cluster: ClusterSpec, model_name: str
    ):
        self._layers, self._num_experts, self._groups = layers, num_experts, groups
        self._cluster, self._model_name = cluster, model_name
        self._counted: tuple[RoutingTrace, np.ndarray, np.ndarray] | None = None  # trace, micro-batches, loads

    def gather_loads(
        self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int
    ) -> np.ndarray:
        """int32 [L, M, R, E]. Collective."""
        local, problem, device = np.zeros(0), None, device_of(self._layers)
        try:
            check_trace(trace, self._layers, self._num_experts)
            local = count_loads(trace, micro_batch_of_sequence, num_micro_batches)
        except ReLibraError as error:
            problem = error
        self._groups.agree(problem, {"num_micro_batches": num_micro_batches}, device, "counting the loads")
        everyone = self._groups.experts.gather_arrays(local, device, "the exchange of loads")  # [R, L, M, E]
        return np.ascontiguousarray(everyone.transpose(1, 2, 0, 3))

    def plan_later(
        self,
        trace: RoutingTrace,
        micro_batch_of_sequence: np.ndarray,
        num_micro_batches: int,
        home: np.ndarray,
        executor: Executor,
    ) -> "Future[BatchPlan]":
        """Plan in `executor`, from the placement `home` [L, E]. Collective until it returns."""
        loads = self.gather_loads(trace, micro_batch_of_sequence, num_micro_batches)
        self._counted = trace, np.array(micro_batch_of_sequence), loads
        everyone = self._groups.gather_over_copies(loads, device_of(self._layers))  # [groups, L, M, R, E]
        return executor.submit(plan_group, everyone, self._groups.copy, self._cluster, home.copy(), self._model_name)

    def take_counted(
        self, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int
    ) -> np.ndarray | None:
        """The loads that the last plan was made from, if it was made from these; once."""
        counted, self._counted = self._counted, None
        if counted is None or counted[0] is not trace or not np.array_equal(counted[1], micro_batch_of_sequence):
            return None
        return counted[2] if counted[2].shape[1] == num_micro_batches else None

    def loads_of(
        self, plan: BatchPlan, trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, counted: np.ndarray | None
    ) -> np.ndarray:
        """The loads that a batch will have, int32 [L, M, R, E]. Collective.

        Args:
            counted: them, where every rank has them already.
        Raises: PlanError where the plan was made for others.
        """
        loads, problem = counted, None
        if loads is None:
            loads = self.gather_loads(trace, micro_batch_of_sequence, plan.num_micro_batches)
        try:
            replace(plan, loads=loads)  # refuses other loads, which are the same on every rank of a group
        except ReLibraError as error:
            problem = error
        self._groups.agree(problem, {}, device_of(self._layers), "checking the loads")
        return loads


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
