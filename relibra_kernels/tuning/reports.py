"""What the compiler says of many configs: each compiled once, and remembered in a file.

A file belongs to one target and Triton version, and an outcome to exactly what was compiled: the kernel's source, its
constants, the signature. Stopping loses the compilations in flight and nothing else.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from ..planner.errors import FormatError
from .model import Resources
from .pool import compiled
from .tasks import Outcome, Task, digest_of


class Reports:
    """Outcomes by task, kept in `folder` as they come; `fresh` forgets what an earlier run left there."""

    def __init__(self, folder: Path, target: str, *, fresh: bool = False) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(f"{folder}: cannot be written: {error.strerror or error}") from None
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
