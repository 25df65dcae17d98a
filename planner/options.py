"""What a plan is to achieve, at what price, and how hard to look for it."""

from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class SearchEffort:
    """How hard to try, in units of work and never of time, so that the plan is the same everywhere.

    fills:      how much of a rank one guest may fill, in the order tried; layers that come out well are not tried again
    placements: how often a layer is placed; each time with more weight on the micro-batches that came out worst
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
class PlanOptions:
    """What a plan is to achieve, and at what price.

    balance:     max/mean over ranks at which a micro-batch is good enough; 1 is as even as possible
    effort:      "full", or "fast" for one pass without second attempts
    min_quota:   a replica is not worth its weights for fewer assignments than this
    max_moves:   with a previous placement, at most this many experts of a layer change their rank
    max_guests:  at most this many guests a rank over all layers
    """

    balance: float = 1.0
    effort: str = "full"
    min_quota: int = 1
    max_moves: int | None = None
    max_guests: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.balance < 1e6:
            raise InputError(f"balance is {self.balance}, but must be at least 1: it is max/mean over ranks")
        if self.effort not in EFFORTS:
            raise InputError(f"effort is {self.effort!r}, but must be one of {sorted(EFFORTS)}")
        for name, least in (("min_quota", 1), ("max_moves", 0), ("max_guests", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 1 << 32:
                raise InputError(f"{name} is {value}, but must be an integer from {least} to 2^32 - 1")
