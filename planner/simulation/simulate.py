"""A batch under several policies, priced by cost.py: the paper's comparison on any load table."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..cluster import ClusterSpec
from ..errors import InputError
from ..loads import total_loads
from ..plan import BatchPlan
from ..planning import search_plan
from ..pricing.cost import Cost, break_even, price
from ..pricing.devices import DeviceSpec
from ..pricing.models import ModelShape
from ..pricing.outcome import Outcome, outcome_of_plan
from ..solver.effort import SearchOptions
from .baselines import BASELINES

OURS = "relibra"
_QUOTA_FACTORS = (1, 4, 16, 1 << 20)  # of the break-even; the last leaves no replica
POLICIES = ("static", *(name for name in BASELINES if name not in ("static", "balanced")), OURS, "balanced")


@dataclass(frozen=True, eq=False)
class Scenario:
    """What is simulated: a model on a cluster of devices, with sequences of this length."""

    model: ModelShape
    cluster: ClusterSpec
    device: DeviceSpec
    sequence_length: int = 8192


@dataclass(frozen=True, eq=False)
class Result:
    """One policy. planning_seconds were measured on the machine that simulates; all else is modelled."""

    policy: str
    cost: Cost
    imbalance_mean: float
    imbalance_worst: float
    replicas: float  # per layer and micro-batch
    guests: float  # per layer
    planning_seconds: float
    rank_load: np.ndarray  # [L, M, R]


def simulate(
    loads: np.ndarray,
    scenario: Scenario,
    policies: Sequence[str] = POLICIES,
    options: SearchOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Result]:
    """Every policy's result by name."""
    table = total_loads(loads)
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise InputError(f"policy {unknown[0]!r} is not known; known are {', '.join(POLICIES)}")
    results = {}
    for name in policies:
        start = time.perf_counter()
        if name == OURS:
            outcome = outcome_of_plan(cheapest_plan(table, scenario, options or SearchOptions()), table)
        else:
            outcome = BASELINES[name](table, scenario.cluster)
        results[name] = _result(name, outcome, scenario, time.perf_counter() - start)
        if progress is not None:
            progress(name)
    return results


def cheapest_plan(table: np.ndarray, scenario: Scenario, options: SearchOptions) -> BatchPlan:
    """The plan whose modelled step is shortest: how even it is worth to be depends on what hides the weights' way.

    First the plan that balances as far as `options` say; where that is not within half a percent of balanced routing,
    plans with fewer guests, and with fewer replicas, each for more assignments, from the break-even of one upwards.
    """
    tokens = table.sum(2).mean() / scenario.model.top_k / scenario.cluster.num_ranks
    least = break_even(scenario.model, scenario.device, tokens, scenario.sequence_length)
    bound = _price(BASELINES["balanced"](table, scenario.cluster), scenario).seconds
    best: BatchPlan | None = None
    best_seconds = np.inf
    for factor in _QUOTA_FACTORS:
        for max_kept in (options.max_kept, 0):
            quota = max(options.min_quota, least * factor)
            tried = replace(options, min_quota=quota, max_kept=max_kept)
            plan = search_plan(table, scenario.cluster, tried, model=scenario.model.name)
            seconds = _price(outcome_of_plan(plan, table), scenario).seconds
            if best is None or seconds < best_seconds:
                best, best_seconds = plan, seconds
            if best_seconds <= bound * 1.005:
                return best
    assert best is not None
    return best


def _price(outcome: Outcome, scenario: Scenario) -> Cost:
    return price(outcome, scenario.model, scenario.device, scenario.cluster.gpus_per_node, scenario.sequence_length)


def _result(name: str, outcome: Outcome, scenario: Scenario, seconds: float) -> Result:
    cost = _price(outcome, scenario)
    ratio = outcome.imbalance()
    known = not np.isnan(ratio).all()
    layers, micro_batches = ratio.shape
    return Result(
        policy=name,
        cost=cost,
        imbalance_mean=float(np.nanmean(ratio)) if known else 1.0,
        imbalance_worst=float(np.nanmax(ratio)) if known else 1.0,
        replicas=float((outcome.pushed_in + outcome.far_in).sum() / (layers * micro_batches)),
        guests=float(outcome.kept_in.sum() / layers),
        planning_seconds=seconds,
        rank_load=outcome.rank_load,
    )
