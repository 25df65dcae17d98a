"""Compiling in other processes: `worker` is what runs in them."""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue

import triton

from ..planner.errors import InputError
from .compile_task import Outcome, Task
from .launch_model import Resources

WORKER = [sys.executable, "-m", "relibra_kernels.tuning.compile_worker"]


def compiled(tasks: list[Task], jobs: int, stop: Callable[[], bool]) -> Iterator[tuple[Task, Outcome]]:
    """Outcomes in the order in which they come. A compiler that takes its process down loses that one config only."""
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is 1; compiling needs a process without it")
    waiting, outcomes = deque(tasks), SimpleQueue[tuple[Task, Outcome] | BaseException]()
    ended, workers = threading.Event(), list[_Worker]()

    def work() -> None:
        with _Worker() as worker:
            workers.append(worker)
            while waiting and not ended.is_set() and not stop():
                try:
                    task = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                outcomes.put((task, worker.outcome(task)))

    def run() -> None:
        try:
            work()
        except BaseException as error:
            outcomes.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(jobs, len(tasks)))]
    try:
        for thread in threads:  # within: Ctrl-C may come at once
            thread.start()
        while any(thread.is_alive() for thread in threads) or not outcomes.empty():
            try:
                found = outcomes.get(timeout=0.05)
            except Empty:
                continue
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        ended.set()
        for worker in workers:
            worker.kill()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()


class _Worker:
    """One process of `WORKER`, started when it is first needed and again where it ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()

    def kill(self) -> None:
        """Let go of what is being compiled."""
        process = self._process  # another thread may let go of it
        if process is not None:
            process.kill()

    def outcome(self, task: Task) -> Outcome:
        if self._process is None:
            root = str(Path(__file__).parents[2])
            paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                WORKER,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(task)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            process.wait()
            process.stdout.close()
            self._process = None
            return f"the compiler ended its process with status {process.returncode}"
        fields = json.loads(answer)
        return fields if isinstance(fields, str) else Resources.from_json(fields)
