"""Ranks of a gloo process group for tests: real processes, started once for each group size and used by many tests."""

import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks begin with these imported. The optimizers import torch._dynamo when they are first made.
PRELOADED = ["relibra_kernels.parallel", "torch.distributed.fsdp", "torch._dynamo"]


def fork_context() -> Any:
    """Processes that begin as copies of one that has imported what ranks need; importing takes seconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Ranks:
    """`size` processes that run the same function at the same time; daemons may not start processes themselves."""

    def __init__(self, size: int, daemon: bool = True):
        context, self.size = fork_context(), size
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        self.broken = False  # an exchange may hang half-way: no further use
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, rank, size, f"file://{self._folder.name}/store")
            process = context.Process(target=_serve, args=arguments, daemon=daemon)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(*arguments)` on every rank; the results by rank. A function of a module, so that it can be sent.

        Raises: the exception that came first as RankError, with its traceback; `kind` is its type's name.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        errors = [answer for answer in answers if isinstance(answer, RankError)]
        if errors:  # where one rank fails, the others only say that they waited for it
            self.broken = True
            raise min(errors, key=lambda error: error.kind == "CommunicationError")
        return answers

    def close(self) -> None:
        if self.broken:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.kill()  # where it has not come to have a group of its own
            self._folder.cleanup()
            return
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
        self._folder.cleanup()


class RankError(Exception):
    """What went wrong on a rank."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    os.setpgid(0, 0)  # a group of its own, so that what it starts ends with it
    torch.set_num_threads(1)
    take_transport(os.environ.get("RELIBRA_TEST_TRANSPORT", "auto"))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send(function(*arguments))
        except Exception as error:
            pipe.send(RankError(type(error).__name__, f"{error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


def take_transport(name: str) -> None:
    """Let tokens travel so wherever a test does not say how."""
    from relibra_kernels.parallel import RuntimeOptions

    place = list(RuntimeOptions.__dataclass_fields__).index("transport")
    defaults = list(RuntimeOptions.__init__.__defaults__)
    defaults[place] = name
    RuntimeOptions.__init__.__defaults__ = tuple(defaults)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
