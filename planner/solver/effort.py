"""How hard the search tries, in units of work and never of time, so that the plan is the same everywhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchEffort:
    """fills: how much of a rank one kept replica may fill, in the order tried; placements: how often a layer is
    placed.
    """

    fills: tuple[float, ...]
    placements: int
    sweeps: int
    rules: int
    steps: int
    slack: float
    candidates: int | None


EFFORTS = {
    "fast": SearchEffort(fills=(0.5,), placements=1, sweeps=1, rules=1, steps=3, slack=8.0, candidates=4),
    "full": SearchEffort(
        fills=(0.5, 0.6, 0.4, 0.75, 0.9), placements=4, sweeps=12, rules=6, steps=8, slack=1.0, candidates=None
    ),
}


@dataclass(frozen=True)
class SearchOptions:
    """What the search is asked for: max/mean, effort, least quota, moves a layer, and kept replicas a rank."""

    balance: float = 1.0
    effort: str = "full"
    min_quota: int = 1
    max_moves: int | None = None
    max_kept: int | None = None
    kept_slots: int | None = None
