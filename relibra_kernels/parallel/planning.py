"""The loads of an expert-parallel group, counted once for a plan and the batch that follows it, and plans from them."""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from ..planner import (
    DEVICES,
    BatchPlan,
    ClusterSpec,
    Estimate,
    ModelShape,
    PlanOptions,
    RoutingTrace,
    estimate_plan,
    plan_batch,
)
from ..planner.errors import ReLibraError
from ..planner.pricing.devices import machine_of
from .comm.groups import Groups
from .routed_batch import RoutedBatch


class Planning:
    """Counts the loads of this rank's group, and plans from those of all groups.

    Args:
        check: refuses a trace of another model.
        device: where the group's collectives want their tensors.
        shape: sizes of the model's MoE layers as they are now, which plans are priced for.
        transport: how their tokens travel.
    """

    def __init__(
        self,
        check: Callable[[RoutingTrace], None],
        groups: Groups,
        cluster: ClusterSpec,
        model_name: str,
        device: Callable[[], torch.device],
        shape: Callable[[], ModelShape],
        transport: str,
    ):
        self._check, self._groups, self._device = check, groups, device
        self._cluster, self._model_name, self._shape = cluster, model_name, shape
        self._transport = transport
        self._counted: tuple[RoutedBatch, np.ndarray] | None = None  # what was counted, and its loads

    def count(self, batch: RoutedBatch) -> np.ndarray:
        """The loads of this rank's sequences, int32 [L, M, E]. Raises: InputError for a trace of another model."""
        self._check(batch.trace)
        return np.ascontiguousarray(batch.loads()[:, :, 0])

    def gather(self, local_LME: np.ndarray) -> np.ndarray:
        """The loads of the group, int32 [L, M, R, E], from those of its ranks, which agree on L and M. Collective."""
        everyone = self._groups.experts.gather_arrays(local_LME, self._device(), "the exchange of loads")
        return np.ascontiguousarray(everyone.transpose(1, 2, 0, 3))

    def gather_loads(self, batch: RoutedBatch | None, problem: ReLibraError | None = None) -> np.ndarray:
        """int32 [L, M, R, E]. Collective.

        Args:
            batch: of this rank; None where it has a problem, which every rank then hears of.
        """
        local = np.zeros(0, np.int32)
        try:
            if batch is not None:
                local = self.count(batch)
        except ReLibraError as error:
            problem = error
        facts = {"num_micro_batches": 0 if batch is None else batch.num_micro_batches}
        self._groups.agree(problem, facts, self._device(), "counting the loads")
        return self.gather(local)

    def plan(
        self,
        batch: RoutedBatch | None,
        problem: ReLibraError | None,
        home: np.ndarray,
        options: PlanOptions | None,
    ) -> BatchPlan:
        """Plan here and now, from the placement `home` [L, E]. Collective."""
        with ThreadPoolExecutor(1) as here:
            return self.plan_later(batch, problem, home, options, here).result()

    def plan_later(
        self,
        batch: RoutedBatch | None,
        problem: ReLibraError | None,
        home: np.ndarray,
        options: PlanOptions | None,
        executor: Executor,
    ) -> "Future[BatchPlan]":
        """Plan in `executor`, from the placement `home` [L, E]. Collective until it returns."""
        loads = self.gather_loads(batch, problem)
        assert batch is not None  # else a problem was raised
        self._counted = batch, loads
        everyone = self._groups.gather_over_copies(loads, self._device())  # [groups, L, M, R, E]
        here = self._groups.copy, self._cluster, home.copy(), self._model_name, self._priced(options)
        return executor.submit(plan_group, everyone, *here)

    def estimate(
        self,
        batch: RoutedBatch | None,
        problem: ReLibraError | None,
        home: np.ndarray,
        plan: BatchPlan | None,
        options: PlanOptions | None,
        keep_replicas: bool,
    ) -> Estimate:
        """What a batch takes under `plan`, or under one made here, from the placement `home` [L, E]. Collective."""
        if plan is None:
            plan = self.plan(batch, problem, home, options)
            assert self._counted is not None
            loads = self._counted[1]
        else:
            loads = self.gather_loads(batch, problem)
            self.check_made_for(plan, loads)
        setting = self._priced(options).setting(plan.num_experts, plan.gpus_per_node, keep_replicas=keep_replicas)
        return estimate_plan(plan, loads, setting, home)

    def _priced(self, options: PlanOptions | None) -> PlanOptions:
        """The options, priced for this model and transport; and for this machine, where its GPU is listed."""
        options, device = options or PlanOptions(), self._device()
        machine = DEVICES["CPU"] if device.type != "cuda" else machine_of(torch.cuda.get_device_name(device))
        return replace(options, shape=self._shape(), device=machine or options.device, transport=self._transport)

    def take_counted(self, batch: RoutedBatch) -> np.ndarray | None:
        """The loads that the last plan was made from, if it was made from this batch; once."""
        counted, self._counted = self._counted, None
        if counted is None or counted[0].trace is not batch.trace:
            return None
        same = counted[0].num_micro_batches == batch.num_micro_batches and np.array_equal(
            counted[0].micro_batch_of_sequence, batch.micro_batch_of_sequence
        )
        return counted[1] if same else None

    def check_made_for(self, plan: BatchPlan, loads_LMRE: np.ndarray) -> None:
        """The plan was made for these loads of its group. Collective.

        Raises: PlanError where it was made for others, here or in another group.
        """
        if not self._groups.copies:  # all ranks have the same plan and loads
            plan.check_made_for(loads_LMRE)
            return
        with self._groups.agreeing(self._device(), "checking the loads"):
            plan.check_made_for(loads_LMRE)


def plan_group(
    loads_GLMRE: np.ndarray,
    group: int,
    cluster: ClusterSpec,
    home: np.ndarray,
    model_name: str,
    options: PlanOptions | None,
) -> BatchPlan:
    """The plan of one of several groups: their micro-batches are planned together, so that they share one `home`."""
    groups, _, micro_batches = loads_GLMRE.shape[:3]
    together = np.concatenate(list(loads_GLMRE), axis=1)  # [L, groups * M, R, E]
    plan = plan_batch(together, cluster, previous_home=home, model=model_name, options=options)
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
