"""What the compiler says of many configs: each compiled once, in other processes, and remembered in a file.

A file belongs to one target and Triton version, and an outcome to exactly what was compiled: the kernel's source, its
constants, the signature. Stopping loses the compilations in flight and nothing else.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import triton

from ..form import ExpertForm
from ..kernels.launch import Launch
from ..planner.errors import InputError
from .catalogue import Layer, meta_schedule, recorded
from .compile_only import compile_launch, specialised
from .configs import parse_config
from .limits import device_named
from .model import Resources


@dataclass(frozen=True)
class Task:
    """One thing to compile: a part of a layer with a config, in bf16, for a target of `limits.DEVICES`."""

    target: str
    kernel: str
    part: str
    config: str
    hidden_size: int
    half: int
    form: ExpertForm
    replicas: int

    @property
    def key(self) -> str:
        form = ",".join(str(value) for value in astuple(self.form))
        sizes = f"{self.hidden_size}x{self.half}"
        return f"{self.kernel} {self.part} {self.config} {sizes} {form} replicas={self.replicas}"


Outcome = Resources | str  # what it needs, or why it could not be compiled


@cache
def launch_of(task: Task) -> Launch:
    """The launch that a training step would make."""
    layer = Layer(task.hidden_size, task.half, task.form, meta_schedule(), task.replicas)
    call = layer.call(task.kernel, task.part, parse_config(task.config))
    return recorded(device_named(task.target), call)[0]


@cache
def digest_of(task: Task) -> str:
    """Names exactly what is compiled for `task`."""
    launch = launch_of(task)
    what = (launch.kernel.cache_key, *specialised(launch))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def compile_task(task: Task) -> Outcome:
    """In this process. An error of the compiler is an answer, not an exception."""
    try:
        report = compile_launch(launch_of(task), device_named(task.target), instructions=False)
    except InputError:
        raise
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
    return Resources(report.registers, report.spill_bytes, report.shared_bytes, report.warps_per_sm)


class Reports:
    """Outcomes by task, kept in `folder` as they come; `fresh` forgets what an earlier run left there."""

    def __init__(self, folder: Path, target: str, *, fresh: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{target}-triton-{triton.__version__}.jsonl"
        self._known: dict[str, Outcome] = {}
        if fresh:
            self._path.unlink(missing_ok=True)
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                self._path.write_text(text + "\n", encoding="utf-8")
            for line in text.splitlines():
                try:
                    digest, _, outcome = json.loads(line)
                except ValueError:  # the last line of a run that was killed
                    continue
                self._known[digest] = outcome if isinstance(outcome, str) else Resources(**outcome)

    def get(self, task: Task) -> Outcome | None:
        """None where it was not compiled yet."""
        return self._known.get(digest_of(task))

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of `tasks` that have no outcome yet, each once."""
        return list({digest_of(task): task for task in tasks if digest_of(task) not in self._known}.values())

    def compile(
        self,
        tasks: Iterable[Task],
        jobs: int,
        done: Callable[[Task, Outcome], None] = lambda task, outcome: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compile what is missing in `jobs` processes; False where `stop` said so before all was done."""
        with self._path.open("a", encoding="utf-8") as file:
            for task, outcome in compiled(self.missing(tasks), jobs, stop):
                self._known[digest_of(task)] = outcome
                fields = outcome if isinstance(outcome, str) else asdict(outcome)
                file.write(json.dumps([digest_of(task), task.key, fields]) + "\n")
                file.flush()
                done(task, outcome)
        return not self.missing(tasks)


def compiled(tasks: list[Task], jobs: int, stop: Callable[[], bool]) -> Iterable[tuple[Task, Outcome]]:
    """Outcomes in the order in which they come. A compiler that takes its process down loses that one config only."""
    waiting, suspects = list(reversed(tasks)), list[Task]()
    while (waiting or suspects) and not stop():
        alone = bool(suspects)  # one of these broke the pool: one at a time, to find out which
        queue = suspects if alone else waiting
        running: dict[Future, Task] = {}
        with ProcessPoolExecutor(1 if alone else jobs, mp_context=get_context("spawn")) as pool:
            try:
                while (queue or running) and not (stop() and not running):
                    while queue and len(running) < (1 if alone else jobs + 1) and not stop():
                        task = queue.pop()
                        running[pool.submit(compile_task, task)] = task
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        yield running.pop(future), outcome
            except BrokenProcessPool:
                if alone:
                    yield next(iter(running.values())), "the compiler ended its process"
                else:
                    suspects = list(running.values())
