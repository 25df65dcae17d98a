"""Tuning for a GPU that is not here: compile every candidate, drop what spills or does not fit, let the model rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..configs.config import GEMM_KERNELS, BlockConfig, Config, GemmConfig
from ..configs.files import Bucket, Entry, merged
from ..configs.limits import Device, device_for
from ..configs.products import Product
from ..configs.spaces import SPACE, WORSE_ELSEWHERE, candidates
from .compile_task import Outcome, Task
from .gates import LARGE, idle_columns, is_shallow
from .launch_model import Resources
from .models import Model
from .ranking import estimate
from .reports import Reports
from .search_goal import PARTS, Goal, layer_shape, one_time

MODEL_DATE = "2026-11-27"  # of the model's last change: what `compiled` entries are dated by
GROUPS = (8, 4, 16)
ALIKE = 1.03
REPLICAS = (0, 2)
# A compiler's report rarely depends on H and I, and a second store of weights seldom makes it better. Where H and I are
# multiples of every block, those of Qwen3-30B-A3B stand for all, and a candidate is compiled with two stores. Only what
# wins is compiled with its own sizes, with one store and with two.
_USUAL_SIZES, _EVERY_BLOCK = (2048, 768), 256


@dataclass
class OfflineSearch:
    """Ranks configs of `models` for `product`. `run` can be stopped, and goes on where `reports` ends.

    Attributes:
        failed: (config, why) of candidates that the compiler refused, in order.
        seconds_up: asked between compilations whether to stop.
    """

    product: Product
    models: Sequence[Model]
    goals: Sequence[Goal]
    reports: Reports
    jobs: int = 1
    done: Callable[[Task, Outcome], None] = lambda task, outcome: None
    seconds_up: Callable[[], bool] = lambda: False
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> Device:
        return device_for(self.product)

    def tasks(self) -> list[Task]:
        """What is compiled before anything is ranked."""
        parts = {(goal.model, goal.kernel, goal.part) for goal in self.goals}
        found = []
        for model, kernel, part in sorted(parts, key=lambda key: (str(key[0]), *key[1:])):
            for config in candidates(kernel, self.device, torch.bfloat16):
                found.append(self._tasks(model, kernel, part, config, *_stand_in(model))[-1])
        return found

    def run(self) -> dict[str, list[Entry]] | None:
        """Entries by kernel, or None where there was no time for all."""
        if not self.reports.compile(self.tasks(), self.jobs, self._note, self.seconds_up):
            return None
        while True:
            chosen = self.choose()
            winners = []
            for goal in self.goals:
                if id(goal) in chosen:
                    sizes = goal.model.hidden_size, goal.model.intermediate_size
                    winners += self._tasks(goal.model, goal.kernel, goal.part, chosen[id(goal)][1], *sizes)
            if not self.reports.missing(winners):
                return self._entries(chosen)
            if not self.reports.compile(winners, self.jobs, self._note, self.seconds_up):
                return None

    def choose(self) -> dict[int, tuple[float, Config]]:
        """(microseconds, config) of every goal that has one, by its id: few different configs for one part of a model.

        Times within `ALIKE` of the best count as equal. Of those, the config that serves most buckets is taken, then
        the one that serves most of what is left: fewer kernels to compile, and no decision finer than the model is.
        """
        parts: dict[tuple, dict[int, dict[Config, float]]] = {}
        for goal in self.goals:
            ranked = self.rank(goal)
            alike = {config: us for us, config in ranked if us <= ranked[0][0] * ALIKE}
            if alike:
                parts.setdefault((goal.model, goal.kernel, goal.part), {})[id(goal)] = alike
        chosen = {}
        for (_, kernel, _), left in parts.items():
            while left:
                served: dict[Config, list[float]] = {}
                for alike in left.values():
                    best = min(alike.values())
                    for config, us in alike.items():
                        served.setdefault(config, []).append(us / best)
                order = {}
                for config, ratios in served.items():
                    new = isinstance(config, BlockConfig) and config not in SPACE[kernel]  # what is untuned may stay
                    order[config] = -len(ratios), new, round(sum(ratios) / len(ratios), 4), _group(config), str(config)
                taken = min(order, key=order.__getitem__)
                for goal_id in [key for key, alike in left.items() if taken in alike]:
                    chosen[goal_id] = left.pop(goal_id)[taken], taken
        return chosen

    def rank(self, goal: Goal) -> list[tuple[float, Config]]:
        """(microseconds, config), the best first: half the even groups' time and half the uneven ones'.

        No config pads more rows of the uneven groups than the one that is best for even ones. Large batches get none
        that multiplies more columns for nothing than the gates allow, where there are others.
        """
        works = goal.works(self.device)
        scored = []
        for compiled in candidates(goal.kernel, self.device, torch.bfloat16):
            resources = self._resources(goal.model, goal.kernel, goal.part, compiled)
            if resources is None or (goal.rows_per_slot >= LARGE and is_shallow(resources.code, self.device)):
                continue
            for config in _with_groups(goal.kernel, compiled):
                even, *uneven = (estimate(work, config, resources, self.product) for work in works)
                us = one_time(even.us, *(e.us for e in uneven))
                padded = sum(e.padded_rows for e in uneven)
                # equal times: fewer padded rows, then the usual group, then by name
                scored.append(((round(us, 2), padded, _group(config), str(config)), even.us, us, config))
        if goal.rows_per_slot >= LARGE and goal.kernel in GEMM_KERNELS:
            sizes = goal.model.hidden_size, goal.model.intermediate_size
            tasks = [self._tasks(goal.model, goal.kernel, goal.part, item[-1], *sizes)[0] for item in scored]
            scored = [item for item, task in zip(scored, tasks, strict=True) if not idle_columns(task)] or scored
        if not scored:
            return []
        scored.sort(key=lambda item: item[0])
        for_even = min(scored, key=lambda item: (round(item[1], 2), *item[0][1:]))
        return [(us, config) for order, _, us, config in scored if order[1] <= for_even[0][1]]

    def best_note(self, task: Task) -> str:
        """The best so far for what `task` was compiled for, in its largest bucket."""
        for goal in reversed(self.goals):
            if (goal.kernel, goal.part) == (task.kernel, task.part):
                best = self.rank(goal)[:1]
                return f"{goal.kernel} {goal.part}: " + (f"{best[0][1]}, {best[0][0]:.0f} us" if best else "none yet")
        return ""

    def _tasks(
        self, model: Model, kernel: str, part: str, config: Config, hidden_size: int, intermediate_size: int
    ) -> list[Task]:
        name = str(_with_groups(kernel, config)[0])  # the order of tiles is a matter of a few integers
        sizes = (self.product.target, kernel, part, name, hidden_size, intermediate_size, model.form)
        return [Task(*sizes, replicas) for replicas in REPLICAS]

    def _resources(self, model: Model, kernel: str, part: str, config: Config) -> Resources | None:
        """The larger needs of its variants; None where one spills, does not fit or compile, or is worse elsewhere."""
        if config in WORSE_ELSEWHERE.get((self.device.family, kernel, not model.form.is_concatenated), ()):
            return None
        tasks = self._tasks(model, kernel, part, config, *_stand_in(model))
        own = self._tasks(model, kernel, part, config, model.hidden_size, model.intermediate_size)
        found = [self.reports.get(tasks[-1]) or "not compiled yet"]
        found += [outcome for outcome in map(self.reports.get, own) if outcome is not None]
        return worst(found, self.device)

    def _note(self, task: Task, outcome: Outcome) -> None:
        if isinstance(outcome, str):
            self.failed[task.key] = outcome
        self.done(task, outcome)

    def _entries(self, chosen: dict[int, tuple[float, Config]]) -> dict[str, list[Entry]]:
        import triton

        found: dict[str, list[Entry]] = {kernel: [] for kernel in PARTS}
        for goal in self.goals:
            if id(goal) not in chosen:
                continue
            us, config = chosen[id(goal)]
            bucket, shape = (
                Bucket(goal.slots, goal.rows_per_slot, str(config), us),
                layer_shape(goal.model, goal.kernel, goal.part),
            )
            entry = replace(shape, triton=triton.__version__, date=MODEL_DATE, buckets=(bucket,))
            found[goal.kernel].append(entry)
        return {kernel: merged([], entries) for kernel, entries in found.items() if entries}


def _with_groups(kernel: str, config: Config) -> list[Config]:
    """`config` with every number of row tiles a group; itself where there are no groups."""
    if not isinstance(config, GemmConfig) or kernel == "grad_weight":
        return [config]
    return [replace(config, group_m=group) for group in GROUPS]


def _group(config: Config) -> int:
    """Which of `GROUPS` a config has, for the order of equals."""
    return GROUPS.index(config.group_m) if isinstance(config, GemmConfig) else 0


def worst(outcomes: Sequence[Outcome], device: Device) -> Resources | None:
    """The most that any variant needs of each resource; None where one spills, exceeds `device` or was not compiled."""
    found = [outcome for outcome in outcomes if isinstance(outcome, Resources)]
    if len(found) < len(outcomes) or any(r.spill_bytes or r.shared_bytes > device.shared_bytes for r in found):
        return None
    return Resources(
        max(r.registers for r in found),
        0,
        max(r.shared_bytes for r in found),
        min(r.warps_per_sm for r in found),
        found[-1].code,
    )


def _stand_in(model: Model) -> tuple[int, int]:
    """The H and I that are compiled in place of the model's."""
    plain = model.form == type(model.form)()
    whole = model.hidden_size % _EVERY_BLOCK == 0 and model.intermediate_size % (_EVERY_BLOCK // 2) == 0
    return _USUAL_SIZES if plain and whole else (model.hidden_size, model.intermediate_size)
