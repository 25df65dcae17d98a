"""Tuning on the GPU that is here: time candidates against what is used now, keep what is faster beyond the noise."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..configs import lookup
from ..configs.config import PARTS_OF_EQUAL_SIZES, Config
from ..configs.files import Bucket, Entry
from ..configs.limits import Device
from ..configs.products import PRODUCTS
from ..configs.spaces import candidates
from .compile_task import Task, digest_of
from .launch_model import Resources
from .ranking import estimate
from .search_goal import Goal, layer_shape, one_time

_HOPELESS = 1.6  # times the modelled best: not worth a clock


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: median, 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.median


class Workload(Protocol):
    """One group table of a goal, on the device."""

    def call(self, config: Config) -> Callable[[], object]:
        """A launch on the next set of inputs, every time it is called."""

    def restore(self) -> None:
        """Reset the buffers that launches add to."""


class Outcomes(Protocol):
    """What was timed before, by key; a `Journal` keeps it in a file."""

    known: dict[str, Any]

    def add(self, key: str, note: str, value: Any) -> None:
        """`note` is for readers."""


class OutOfTime(Exception):  # noqa: N818 (nothing is wrong)
    """The budget ended before a goal was finished."""


@dataclass(frozen=True)
class Measured:
    """A config's time over all group tables of a goal (`goals.one_time`), and the largest spread."""

    us: float
    spread: float


@dataclass
class OnlineSearch:
    """Times configs for `goals` on `device`; goes on where `journal` ends.

    Attributes:
        prepare: makes the inputs of a goal, a workload a group table; may fail, for want of memory.
        bench: times a call.
        out_of_time: asked before every candidate.
        done: told of every candidate: what it was, and the best so far.
        failed: what could not be timed, and why.
    """

    device: Device
    goals: Sequence[Goal]
    journal: Outcomes
    prepare: Callable[[Goal], Sequence[Workload]]
    bench: Callable[[Callable[[], object]], Timing]
    out_of_time: Callable[[], bool] = lambda: False
    done: Callable[[str, str], None] = lambda what, best: None
    failed: dict[str, str] = field(default_factory=dict)

    def candidates(self, goal: Goal) -> list[Config]:
        """What is used now, then everything that fits and that the model does not find hopeless."""
        dtype = torch.bfloat16
        found = [config for config in candidates(goal.kernel, self.device, dtype) if config != self.incumbent(goal)]
        product = PRODUCTS.get(self.device.product)
        if product is not None:
            resources = Resources(0, 0, 0, self.device.warps_per_sm)  # at best: registers are known when it is compiled
            works = goal.works(self.device)
            us = {config: sum(estimate(work, config, resources, product).us for work in works) for config in found}
            found = sorted(found, key=lambda config: (us[config], str(config)))
            found = [config for config in found if us[config] <= _HOPELESS * us[found[0]]]
        return [self.incumbent(goal), *found]

    def incumbent(self, goal: Goal) -> Config:
        """What a launch would get now."""
        n, d, layout, interleaved = layer_shape(goal.model, goal.kernel, goal.part).sizes(goal.kernel)
        part = goal.part if goal.kernel in PARTS_OF_EQUAL_SIZES else ""
        rows, where = goal.rows_per_slot * goal.slots, (self.device, torch.bfloat16, (n, d))
        return lookup.config_of(goal.kernel, *where, rows, goal.slots, layout, interleaved, part)

    def run(self, triton: str, driver: str, date: str) -> tuple[dict[str, list[Entry]], int]:
        """(entries by kernel, how many goals are not finished); a goal that was not finished has no entry."""
        entries: dict[str, list[Entry]] = {}
        left = 0
        for goal in self.goals:
            try:
                found = self.measure(goal)
            except OutOfTime:
                left += 1
                continue
            if found is None:
                continue
            config, timing = found
            bucket = Bucket(goal.slots, goal.rows_per_slot, str(config), timing.us, timing.spread)
            shape = layer_shape(goal.model, goal.kernel, goal.part)
            entry = replace(shape, evidence="measured", triton=triton, driver=driver, date=date, buckets=(bucket,))
            entries.setdefault(goal.kernel, []).append(entry)
        return entries, left

    def measure(self, goal: Goal) -> tuple[Config, Measured] | None:
        """The config to use and its time; None where nothing could be timed.

        Another config replaces the one in use only where it is faster by more than the spread of both.

        Raises: OutOfTime.
        """
        incumbent, *others = self.candidates(goal)
        workloads: Sequence[Workload] | None = None
        timed: dict[Config, Measured] = {}
        for config in (incumbent, *others):
            key, name = self._key(goal, config), f"{goal.kernel} {goal.part} {goal.slots}x{goal.rows_per_slot} {config}"
            if key not in self.journal.known:
                if self.out_of_time():
                    raise OutOfTime
                try:
                    workloads = self.prepare(goal) if workloads is None else workloads
                    outcome: dict | str = vars(self._time(config, workloads))
                except Exception as error:  # out of memory, of shared memory, or whatever a compiler raises
                    outcome = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self.journal.add(key, name, outcome)
            known = self.journal.known[key]
            if isinstance(known, str):
                self.failed[name] = known
            else:
                timed[config] = Measured(**known)
            best = min(timed, key=lambda c: (timed[c].us, str(c))) if timed else None
            self.done(name, f"{best}, {timed[best].us:.1f} us" if best else "none yet")
        if not timed:
            return None
        best = min(timed, key=lambda c: (timed[c].us, str(c)))
        now = timed.get(incumbent)
        if now is not None and timed[best].us >= now.us * (1 - max(now.spread, timed[best].spread)):
            best = incumbent
        return best, timed[best]

    def _time(self, config: Config, workloads: Sequence[Workload]) -> Measured:
        times = []
        for workload in workloads:
            try:
                times.append(self.bench(workload.call(config)))
            finally:
                workload.restore()
        return Measured(one_time(*(timing.median for timing in times)), max(timing.spread for timing in times))

    def _key(self, goal: Goal, config: Config) -> str:
        """Names what is timed: what is compiled, and the group tables."""
        sizes = goal.model.hidden_size, goal.model.intermediate_size, goal.model.form
        task = Task(self.device.name, goal.kernel, goal.part, str(config), *sizes, 0)
        groups = ";".join(",".join(map(str, table)) for table in goal.groups)
        what = f"{digest_of(task)} {goal.part} top-{goal.model.top_k} {groups}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]
