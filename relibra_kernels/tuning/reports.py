"""What the compiler says of many configs: each compiled once, and remembered in a file.

A file belongs to one target and Triton version, and an outcome to exactly what was compiled: the kernel's source, its
constants, the signature. Stopping loses the compilations in flight and nothing else.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from .compile_pool import compiled
from .compile_task import Outcome, Task, digest_of
from .journal import Journal
from .launch_model import Resources


class Reports:
    """Outcomes by task, kept in `folder`; `fresh` forgets what an earlier run left there."""

    def __init__(self, folder: Path, target: str, *, fresh: bool = False) -> None:
        self._journal = Journal(folder / f"{target}-triton-{triton.__version__}.jsonl", fresh=fresh)

    def get(self, task: Task) -> Outcome | None:
        """The outcome of `task`; None where it was not compiled yet."""
        known = self._journal.known.get(digest_of(task))
        return Resources.from_json(known) if isinstance(known, dict) else known

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of `tasks` that have no outcome yet, each once."""
        known = self._journal.known
        return list({digest_of(task): task for task in tasks if digest_of(task) not in known}.values())

    def compile(
        self,
        tasks: Iterable[Task],
        jobs: int,
        done: Callable[[Task, Outcome], None] = lambda task, outcome: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compile what is missing in `jobs` processes; False where `stop` said so before all was done."""
        for task, outcome in compiled(self.missing(tasks), jobs, stop):
            self._journal.add(digest_of(task), task.key, outcome if isinstance(outcome, str) else asdict(outcome))
            done(task, outcome)
        return not self.missing(tasks)
