"""Measured configs for two models, in minutes; and how well the choice without a GPU had guessed them.

Every bucket's winner is a figure as soon as it is known: `relibra tune --import results.jsonl` writes them into the
files of configs, also those of a case that ended early.
"""

from __future__ import annotations

import datetime
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from .case import Case, Wrong
from .shares import TUNED, TUNED_ROWS, TUNED_SLOTS
from .smoke import COMPILED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from relibra_kernels.configs.config import Config
    from relibra_kernels.tuning.measure import OnlineSearch, Timing
    from relibra_kernels.tuning.search_goal import Goal

    from .setting import Setting

SLICES = 6
# the dearest first: what is not reached is cheap
PARTS = (
    ("grad_weight", "gate_up"), ("gate_up", "gate_up"), ("grouped_gemm", "down"), ("grouped_gemm", "dx"),
    ("grad_hidden", "grad_hidden"), ("grad_weight", "down"), ("permute", "unpermute"), ("schedule", "schedule"),
    ("grad_bias", "gate_up"), ("grad_bias", "down"),
)  # fmt: skip
REHEARSED = (("grad_weight", "down"), ("grouped_gemm", "dx"))
_TOO_FEW = "fewer than three configs"
_SURE = 1.25  # a shipped choice that is slower than the best by more than this is worth a look


def cases(rehearse: bool) -> list[Case]:
    found = [
        Case(f"compile {i + 1} of {SLICES}", "compile_slice", {"index": i}, 150, beside=True, env=COMPILED,
             rehearsed=i == 0)
        for i in range(SLICES)
    ]  # fmt: skip
    for kernel, part in PARTS:
        for model in TUNED:
            if kernel != "grad_bias" or model.startswith("gpt-oss"):
                options = {"model": model, "kernel": kernel, "part": part}
                rehearsed = model == TUNED[0] and (kernel, part) in REHEARSED
                found.append(
                    Case(f"{kernel} {part}, {model}", "measure", options, 60, env=COMPILED, rehearsed=rehearsed)
                )
    return found


def _goals(setting: Setting, model: str, kernel: str, part: str) -> list[Goal]:
    from relibra_kernels.tuning.launch_model import balanced, skewed
    from relibra_kernels.tuning.search_goal import Goal

    from .problems import model_of

    of = model_of(setting, model)
    found: list[Goal] = []
    for rows in setting.size(TUNED_ROWS, (8,)):
        for slots in setting.size(TUNED_SLOTS, (2,)):
            if kernel == "permute":  # a matter of tokens alone
                rows_here = rows if setting.rehearse else rows * max(TUNED_SLOTS) // of.top_k
                goal = Goal(of, kernel, part, 1, rows_here, (balanced(1, rows_here),))
            else:
                goal = Goal(of, kernel, part, slots, rows, (balanced(slots, rows), skewed(slots, rows)))
            if not any((goal.slots, goal.rows_per_slot) == (other.slots, other.rows_per_slot) for other in found):
                found.append(goal)
    return found


def compile_slice(setting: Setting, index: int) -> None:
    """Every n-th of all candidates of all parts, into Triton's cache."""
    import os

    from relibra_kernels.compiling.precompiling import compile_for, compile_on
    from relibra_kernels.configs.limits import device_for, device_of
    from relibra_kernels.configs.products import PRODUCTS

    target = device_for(PRODUCTS["H100"]) if setting.rehearse else device_of(setting.device)
    launches, refused = _candidates(setting, target), []
    mine = launches[index::SLICES][: setting.size(len(launches), 2)]
    jobs, begun = max(1, (os.cpu_count() or 1) // SLICES), time.monotonic()
    compile_all = (lambda some: compile_for(target, some, jobs)) if setting.rehearse else (
        lambda some: compile_on(setting.device, some, jobs)
    )  # fmt: skip
    with setting.report.compiling(f"slice {index}"):
        try:
            compile_all(mine)
        except Exception:  # one candidate may not compile: the others do
            for launch in mine:
                try:
                    compile_all([launch])
                except Exception as error:
                    refused.append(f"{launch.kernel.__name__}: {type(error).__name__}")
    seconds = time.monotonic() - begun
    setting.report.figures(launches=len(mine), of=len(launches), compile_seconds=seconds, refused=refused[:20])


def _candidates(setting: Setting, target: Any) -> list[Any]:
    import torch

    from relibra_kernels.compiling.compile_only import launch_digest
    from relibra_kernels.configs.spaces import candidates
    from relibra_kernels.tuning.catalogue import Layer, meta_schedule, recorded

    from .problems import model_of

    found = []
    for name in TUNED:
        model = model_of(setting, name)
        for kernel, part in PARTS:
            layer = Layer(
                model.hidden_size, model.intermediate_size, model.form, meta_schedule(), 0, kernel == "grad_weight"
            )
            if kernel != "grad_bias" or model.form.has_bias:
                for config in candidates(kernel, target, torch.bfloat16):
                    found += recorded(target, layer.call(kernel, part, config))
    return list({launch_digest(launch): launch for launch in found}.values())


def measure(setting: Setting, model: str, kernel: str, part: str) -> None:
    """The best config of every bucket, and the figures of all that were timed."""
    import triton

    from relibra_kernels.configs.limits import device_for, device_of
    from relibra_kernels.configs.products import PRODUCTS
    from relibra_kernels.tuning.measure import OnlineSearch
    from relibra_kernels.tuning.measured_inputs import driver_version

    device = setting.size(None, device_for(PRODUCTS["H100"])) or device_of(setting.device)
    goals, buckets = _goals(setting, model, kernel, part), list[dict[str, Any]]()
    setting.report.figures(
        product=device.product, model=goals[0].model.name, kernel=kernel, part=part, triton=triton.__version__,
        driver="rehearsal" if setting.rehearse else driver_version(), date=str(datetime.date.today()),
    )  # fmt: skip
    until = time.monotonic() + 50
    for goal in goals:
        timings = Timings()
        search = OnlineSearch(
            device, [goal], timings, lambda goal: _prepare(setting, goal), lambda call: _bench(setting, call)
        )
        search.out_of_time = lambda: time.monotonic() > until
        entries, left = search.run(triton.__version__, "", "")
        if left or not entries:
            continue
        (bucket,) = entries[kernel][0].buckets
        buckets.append(_figures(setting, device, goal, search, timings, bucket))
        setting.report.figures(buckets=buckets)
    if not buckets:
        raise Wrong("no bucket was finished")
    ranked = [bucket["rank_correlation"] for bucket in buckets if bucket["rank_correlation"] != _TOO_FEW]
    setting.report.figures(
        regret_worst=max(bucket["regret"] for bucket in buckets),
        rank_correlation_least=min(ranked, default=_TOO_FEW),
        look_at=[f"{b['slots']}x{b['rows_per_slot']}" for b in buckets if b["regret"] > _SURE - 1],
    )  # fmt: skip


class Timings:
    """A journal in memory, as `OnlineSearch` keeps it."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.us: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def add(self, key: str, note: str, value: Any) -> None:
        self.known[key] = value
        config = note.split()[-1]
        if isinstance(value, str):
            self.failed[config] = value
        else:
            self.us[config] = value["us"]


class NoWorkload:
    """Stands for a launch in a rehearsal, whose device is not there."""

    def call(self, config: Config) -> Callable[[], object]:
        return lambda: config

    def restore(self) -> None:
        """Nothing was added to."""


def _prepare(setting: Setting, goal: Goal) -> list[Any]:
    from relibra_kernels.tuning.measured_inputs import prepare

    return [NoWorkload() for _ in goal.groups] if setting.rehearse else list(prepare(goal))


def _bench(setting: Setting, call: Any) -> Timing:
    from relibra_kernels.tuning.measure import Timing

    taken = setting.clock.of([call], seconds=0.04, rounds=15)
    return Timing(1e6 * taken.median, 1e6 * taken.low, 1e6 * taken.high)


def _figures(
    setting: Setting, device: Any, goal: Goal, search: OnlineSearch, timings: Timings, bucket: Any
) -> dict[str, Any]:
    now = str(search.incumbent(goal))
    best = min(timings.us.values())
    return {
        "slots": bucket.slots,
        "rows_per_slot": bucket.rows_per_slot,
        "config": bucket.config,
        "us": bucket.us,
        "spread": bucket.spread,
        "used_now": now,
        "regret": timings.us.get(now, best) / best - 1,
        "rank_correlation": _rank_correlation(setting, device, goal, timings.us),
        "timed": timings.us,
        "failed": timings.failed,
    }


def _rank_correlation(setting: Setting, device: Any, goal: Goal, us: dict[str, float]) -> float | str:
    """Spearman's, of the modelled times of what was compiled and the measured ones."""
    from relibra_kernels.configs.config import parse_config
    from relibra_kernels.configs.products import PRODUCTS
    from relibra_kernels.tuning.ranking import estimate

    product = PRODUCTS.get(device.product)
    if product is None or len(us) < 3:
        return _TOO_FEW
    modelled = {}
    for config in us:
        resources = _resources(setting, device, goal, parse_config(config))
        modelled[config] = sum(
            estimate(work, parse_config(config), resources, product).us for work in goal.works(device)
        )
    return spearman([us[config] for config in us], [modelled[config] for config in us])


def _resources(setting: Setting, device: Any, goal: Goal, config: Config) -> Any:
    from relibra_kernels.tuning.compile_task import Task
    from relibra_kernels.tuning.launch_model import Resources

    if not setting.rehearse:
        model = goal.model
        sizes = model.hidden_size, model.intermediate_size, model.form
        found = _compiled(Task(device.name, goal.kernel, goal.part, str(config), *sizes, 0))
        if isinstance(found, Resources):
            return found
    return Resources(0, 0, 0, device.warps_per_sm)


@cache
def _compiled(task: Any) -> Any:
    from relibra_kernels.tuning.compile_task import compile_task

    return compile_task(task)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation without ties."""

    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [order.index(i) for i in range(len(values))]

    n = len(first)
    squares = sum((a - b) ** 2 for a, b in zip(ranks(first), ranks(second), strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))
