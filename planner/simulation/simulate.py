"""A batch under several policies, priced by cost.py: the paper's comparison on any load table."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from ..cluster import ClusterSpec
from ..errors import InputError, PolicyError, ReLibraError, one_of
from ..loads import total_loads
from ..options import PlanOptions
from ..plan import contiguous_home
from ..planning import plan_batch
from ..pricing.cost import Cost, Setting, price
from ..pricing.outcome import Outcome, outcome_of_plan
from .baselines import BASELINES, Policy

OURS = "relibra"
POLICIES = (*(name for name in BASELINES if name != "balanced"), OURS, "balanced")


@dataclass(frozen=True, eq=False)
class Scenario:
    """What is simulated: a cluster, and options that say the model, the machine, the caps and the transport."""

    cluster: ClusterSpec
    options: PlanOptions

    @property
    def setting(self) -> Setting:
        options = self.options
        return Setting(
            options.shape, options.device, self.cluster.gpus_per_node, options.sequence_length, options.transport
        )


@dataclass(frozen=True, eq=False)
class Result:
    """What one policy comes to. `planning_seconds` is measured on the machine that simulates; all else is modelled.

    imbalance_mean, imbalance_worst: max/mean over ranks, of the (layer, micro-batch) pairs
    fetched:     fetched replicas per layer and micro-batch, all ranks together. kept: kept ones per layer
    moved:       experts that changed their home, per layer
    local_share: part of the assignments that are computed on their token's node
    fits:        whether its kept replicas are within the memory cap; a baseline that does not fit is shown all the same
    rank_load:   int [L, M, R], assignments of each rank
    home:        int32 [L, E] of our plan: where the next batch finds the experts. None for baselines
    """

    policy: str
    cost: Cost
    imbalance_mean: float
    imbalance_worst: float
    fetched: float  # per layer and micro-batch, all ranks
    kept: float  # per layer, all ranks
    moved: float  # experts that changed their home, per layer
    local_share: float
    fits: bool
    planning_seconds: float
    rank_load: np.ndarray  # [L, M, R]
    home: np.ndarray | None = None  # [L, E], of our plan: where the next batch finds the experts


def simulate(
    loads: np.ndarray,
    scenario: Scenario,
    policies: Sequence[str] = POLICIES,
    progress: Callable[[str], None] | None = None,
    *,
    previous_home: np.ndarray | None = None,
    others: Mapping[str, Policy] | None = None,
) -> dict[str, Result]:
    """Every policy's result by name. Ours is what `plan_batch` returns for the scenario's options.

    previous_home: [L, E], where our plan of the batch before left the experts; None: contiguous homes
    others: the caller's own policies: name in `policies` -> function of (table int [L, M, E], cluster)

    Raises: PolicyError where one of `others` fails, or returns what is no Outcome of the table; InputError, and any
        other of our errors that a policy raises itself.
    """
    known = BASELINES | dict(others or {})
    table = total_loads(loads)
    layers, _, experts = table.shape
    scenario = replace(
        scenario, options=replace(scenario.options, shape=replace(scenario.options.shape, experts=experts))
    )
    policies = [name if name in known else one_of("policy", name, POLICIES) for name in policies]
    results = {}
    for name in policies:
        start = time.perf_counter()
        if name == OURS:
            plan = plan_batch(loads, scenario.cluster, previous_home=previous_home, options=scenario.options)
            before = contiguous_home(layers, experts, scenario.cluster.num_ranks)
            outcome = outcome_of_plan(plan, loads, before if previous_home is None else previous_home)
            home = plan.home
        else:
            outcome, home = _outcome(name, known, table, scenario.cluster, others), None
        with _failing_by_name(name, others):
            results[name] = replace(_result(name, outcome, scenario, time.perf_counter() - start), home=home)
        if progress is not None:
            progress(name)
    return results


def unable(name: str, experts: int, cluster: ClusterSpec, others: Mapping[str, Policy] | None = None) -> str:
    """Why a policy cannot serve a cluster, found on a table of one micro-batch; empty where it can.

    Raises: PolicyError where one of `others` fails.
    """
    try:
        cluster.home_slots(experts)
        if name != OURS:
            _outcome(name, BASELINES | dict(others or {}), np.ones((1, 1, experts), np.int64), cluster, others)
    except InputError as error:
        return str(error)
    return ""


@contextmanager
def _failing_by_name(name: str, others: Mapping[str, Policy] | None) -> Iterator[None]:
    """Raise errors of the caller's policies as PolicyErrors. Errors of the library, and of its own policies, stay."""
    try:
        yield
    except ReLibraError:
        raise
    except Exception as error:
        if name not in (others or {}):
            raise
        raise PolicyError(f"policy {name!r} failed: {type(error).__name__}: {error}") from error


def _outcome(
    name: str,
    known: Mapping[str, Policy],
    table: np.ndarray,
    cluster: ClusterSpec,
    others: Mapping[str, Policy] | None,
) -> Outcome:
    """What a policy makes of a table. An InputError of it says that it cannot serve the cluster."""
    with _failing_by_name(name, others):
        outcome = known[name](table, cluster)
        if not isinstance(outcome, Outcome):
            raise PolicyError(f"policy {name!r} returned a {type(outcome).__name__}, but must return an Outcome")
        if not np.array_equal(outcome.rank_load.sum(2), table.sum(2)):
            raise PolicyError(f"policy {name!r} computes other assignments than the table has")
    return outcome


def _result(name: str, outcome: Outcome, scenario: Scenario, seconds: float) -> Result:
    ratio = outcome.imbalance()
    known = not np.isnan(ratio).all()
    layers, micro_batches = ratio.shape
    kept = outcome.kept_in + outcome.kept_near_in
    return Result(
        policy=name,
        cost=price(outcome, scenario.setting),
        imbalance_mean=float(np.nanmean(ratio)) if known else 1.0,
        imbalance_worst=float(np.nanmax(ratio)) if known else 1.0,
        fetched=float((outcome.pushed_in + outcome.far_in).sum() / (layers * micro_batches)),
        kept=float(kept.sum() / layers),
        moved=float(outcome.moved_in.sum() / layers),
        local_share=outcome.local_share,
        fits=bool(outcome.kept_copies.max() <= scenario.options.kept_copies),
        planning_seconds=seconds,
        rank_load=outcome.rank_load,
    )
