"""Cases one after the other, or several at once, each in a process of its own with its own limit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .case import CRASHED, NOT_COMPILED, NOT_REACHED, OK, TIMEOUT, Case, Result, results_of

BENCH = Path(__file__).parents[1]
IMPORT_SECONDS = 150  # torch from a cold disk
LEAST_SECONDS = 2  # of a stage's time left: with less, a case is not started
REHEARSAL = {"TRITON_INTERPRET": "1", "RELIBRA_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


class Process:
    """A worker that imports what all cases need and waits for the one case that it is for."""

    def __init__(self, folder: Path, number: int, env: dict[str, str]) -> None:
        self._report, self.log = folder / f"{number}.jsonl", folder / f"{number}.log"
        self.folder, self._begun, self._ready = folder, 0.0, 0.0
        path = os.pathsep.join(filter(None, (str(BENCH), str(BENCH.parent), os.environ.get("PYTHONPATH"))))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpu_stages.worker", str(self._report)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET, **env, "PYTHONPATH": path},
                start_new_session=True,
            )

    def give(self, stage: str, case: Case, limit: float, about: dict[str, Any]) -> None:
        """Begin; the limit counts from when everything is imported."""
        self.stage, self.case, self.limit, self._begun = stage, case, limit, time.monotonic()
        request = {"stage": stage, "case": case.name, "function": case.function, "limit": limit, **about}
        request["options"] = dict(case.options)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.close()
        except OSError:  # it died while it imported: `poll` says so
            pass

    def poll(self, device: str) -> Result | None:
        """What became of it; None while it runs."""
        now = time.monotonic()
        if not self._ready and any("ready" in entry for entry in self._entries()):
            self._ready = now
        code = self._process.poll()
        late = now > (self._ready + self.limit if self._ready else self._begun + IMPORT_SECONDS)
        if code is None and not late:
            return None
        self.kill()  # also what it started and left behind
        return self._result(code, now - (self._ready or self._begun), device)

    def kill(self) -> None:
        """With all that it started. One that hangs in the driver is left behind."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            pass

    def _entries(self) -> list[dict[str, Any]]:
        try:
            text = self._report.read_text(encoding="utf-8")
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # cut off
                continue
        return found

    def _result(self, code: int | None, seconds: float, device: str) -> Result:
        said: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        for entry in self._entries():
            figures.update(entry.pop("figures", {}))
            said.update(entry)
        if "status" in said:
            status, error = said["status"], said.get("error", "")
        else:
            status = TIMEOUT if code is None else CRASHED
            compiling = f" while compiling {said['compiling']}" if said.get("compiling") else ""
            status = NOT_COMPILED if compiling else status
            ended = f"ended after {self.limit:.0f} s" if code is None else f"process ended with status {code}"
            error = f"{ended}{compiling}: {self._tail()}"
        named = said.get("device", device)
        return Result(self.stage, self.case.name, status, seconds, named, figures, error[-1500:])

    def _tail(self) -> str:
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            return text.partition("\n")[2][-1400:].strip()  # the first line says which case it is
        except OSError:
            return ""


class Runner:
    """Writes one line a case to `path`, as they end, and never raises on account of one.

    Attributes:
        device: the GPU's name as far as it is known.
        done: told of every result.
    """

    def __init__(
        self,
        path: Path,
        work: Path,
        *,
        rehearse: bool,
        device: str,
        at_once: int,
        done: Callable[[Result], None] = lambda result: None,
    ) -> None:
        self.path, self.work, self.rehearse, self.device, self.at_once = path, work, rehearse, device, at_once
        self.results: list[tuple[Case, Result]] = []
        self._done, self._number, self._waiting = done, 0, list[tuple[dict[str, str], Process]]()
        work.mkdir(parents=True, exist_ok=True)

    def run(self, stage: str, cases: Sequence[Case], until: float) -> None:
        """All cases in order until the clock says `until` (`time.monotonic`); what does not begin is not reached."""
        queue, running = list(cases), list[Process]()
        try:
            while queue or running:
                while queue and self._may_start(queue[0], running):
                    case = queue.pop(0)
                    left = until - time.monotonic()
                    if left < LEAST_SECONDS:
                        self.add(case, Result(stage, case.name, NOT_REACHED, 0, self.device, {}, "out of time"))
                        continue
                    running.append(self._start(stage, case, min(self._limit(case), left), queue))
                for process in list(running):
                    result = process.poll(self.device)
                    if result is not None:
                        running.remove(process)
                        self.add(process.case, result)
                time.sleep(0.02)
        finally:
            for process in running:
                process.kill()
                result = process.poll(self.device)
                if result is not None:
                    self.add(process.case, result)

    def _limit(self, case: Case) -> float:
        """A rehearsal's machine may be a small and busy one."""
        return case.seconds * (4 if self.rehearse and case.expect == OK else 1)

    def close(self) -> None:
        for _, process in self._waiting:
            process.kill()
        self._waiting = []

    def _may_start(self, case: Case, running: list[Process]) -> bool:
        if not running:
            return True
        return case.beside and all(process.case.beside for process in running) and len(running) < self.at_once

    def _start(self, stage: str, case: Case, limit: float, following: Sequence[Case]) -> Process:
        process = self._process(self._env(case))
        process.give(stage, case, limit, {"rehearse": self.rehearse, "known": self._known(), "work": str(self.work)})
        for later in following[: self.at_once]:  # import while this one runs
            env = self._env(later)
            wanted = sum(self._env(other) == env for other in following[: self.at_once])
            if sum(other == env for other, _ in self._waiting) < wanted:
                self._waiting.append((env, self._spawn(env)))
        return process

    def _process(self, env: dict[str, str]) -> Process:
        for index, (its, process) in enumerate(self._waiting):
            if its == env:
                del self._waiting[index]
                return process
        return self._spawn(env)

    def _spawn(self, env: dict[str, str]) -> Process:
        self._number += 1
        return Process(self.work, self._number, env)

    def _env(self, case: Case) -> dict[str, str]:
        return {**(REHEARSAL if self.rehearse else {}), **case.env}

    def _known(self) -> dict[str, Any]:
        """What cases may need of those before them: the device's peaks."""
        for result in reversed(results_of(self.path)):
            if result.case == "peaks" and result.status == OK:
                return result.figures
        return {}

    def add(self, case: Case, result: Result) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(result.line() + "\n")
        self.results.append((case, result))
        self._done(result)
