"""The columns of a simulation, the same in the terminal and in the report."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..planner import Result, Scenario

Rows = dict[str, Result]


@dataclass(frozen=True, eq=False)
class Case:
    """One batch of one scenario under every policy.

    batch:  its number, of `batches` in a row
    failed: policies of the user's that have no result, and why
    """

    scenario: Scenario
    batch: int
    batches: int
    rows: Rows
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        name = f"{self.scenario.options.shape.name}, EP {self.scenario.cluster.num_ranks}"
        return name + (f", batch {self.batch + 1} of {self.batches}" if self.batches > 1 else "")


@dataclass(frozen=True)
class Column:
    name: str
    meaning: str
    cell: Callable[[Rows, Result], str]
    width: int = 8


def relative_to(rows: Rows, name: str, result: Result) -> float | None:
    """Throughput of `result` over that of the policy `name`; None where that was not simulated."""
    return rows[name].cost.seconds / result.cost.seconds if name in rows else None


def _ratio(rows: Rows, name: str, result: Result) -> str:
    value = relative_to(rows, name, result)
    return "-" if value is None else f"{value:.3f}"


COLUMNS = (
    Column("x static", "throughput over static placement", lambda rows, r: _ratio(rows, "static", r), 9),
    Column("of balanced", "throughput over forced balanced routing", lambda rows, r: _ratio(rows, "balanced", r), 11),
    Column("max/mean", "busiest rank over the mean, mean of all", lambda _, r: f"{r.imbalance_mean:.4f}", 9),
    Column("worst", "the worst of these", lambda _, r: f"{r.imbalance_worst:.3f}", 7),
    Column("fetched", "replicas a layer and micro-batch", lambda _, r: f"{r.fetched:.1f}"),
    Column("kept", "replicas a layer", lambda _, r: f"{r.kept:.1f}", 6),
    Column("moved", "experts that change their home, a layer", lambda _, r: f"{r.moved:.1f}", 6),
    Column("local", "part of assignments that stay on their node", lambda _, r: _share(r.local_share), 6),
    Column("MB fast", "a layer and micro-batch, in nodes", lambda _, r: f"{r.cost.bytes_fast / 1e6:.0f}"),
    Column("MB slow", "the same between nodes", lambda _, r: f"{r.cost.bytes_slow / 1e6:.0f}"),
    Column("step s", "seconds of the simulated layers, modelled", lambda _, r: f"{r.cost.seconds:#.3g}"),
    Column("plan s", "seconds of planning, measured here", lambda _, r: f"{r.planning_seconds:.2f}", 7),
)
BEYOND = "beyond the cap"


def _share(share: float) -> str:
    return "-" if np.isnan(share) else f"{share:.3f}"


def lines_of(case: Case) -> list[str]:
    """A line a policy, under one of headings; those that failed come last."""
    rows = case.rows
    wide = max(18, *map(len, [*rows, *case.failed]))
    lines = [" ".join([f"{'policy':{wide}}", *(f"{column.name:>{column.width}}" for column in COLUMNS)])]
    for result in rows.values():
        cells = [f"{column.cell(rows, result):>{column.width}}" for column in COLUMNS]
        lines.append(" ".join([f"{result.policy:{wide}}", *cells]) + ("" if result.fits else f"  {BEYOND}"))
    return lines + [f"{name:{wide}} FAILED: {why}" for name, why in case.failed.items()]


def record_of(case: Case, result: Result) -> dict[str, object]:
    """One result for programs."""
    return {
        "model": case.scenario.options.shape.name,
        "ep": case.scenario.cluster.num_ranks,
        "batch": case.batch,
        "policy": result.policy,
        "modelled_seconds": result.cost.seconds,
        "imbalance_mean": result.imbalance_mean,
        "imbalance_worst": result.imbalance_worst,
        "fetched_mean": result.fetched,
        "kept_mean": result.kept,
        "moved_mean": result.moved,
        "local_share": None if np.isnan(result.local_share) else result.local_share,
        "fits": result.fits,
        "bytes_fast": result.cost.bytes_fast,
        "bytes_slow": result.cost.bytes_slow,
    }


def failure_record(case: Case, name: str) -> dict[str, object]:
    """One policy that failed, for programs."""
    return {
        "model": case.scenario.options.shape.name,
        "ep": case.scenario.cluster.num_ranks,
        "batch": case.batch,
        "policy": name,
        "error": case.failed[name],
    }
