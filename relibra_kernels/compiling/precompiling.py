"""Compiling recorded launches ahead of the first step: many at a time, with a progress bar."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime.jit import JITCallable, MockTensor

from ..configs.limits import Device
from ..kernels.launch import Launch
from ..progress import Progress
from .compile_only import compile_launch

_parsing = threading.Lock()


@contextmanager
def _one_parser_at_a_time() -> Iterator[None]:
    """Within, threads that compile take turns at parsing: CPython 3.11 counts the recursion of all of them together and
    fails with "AST constructor recursion depth mismatch" (python/cpython#106905).
    """
    parse = JITCallable.parse

    def in_turn(kernel: JITCallable) -> Any:
        with _parsing:
            return parse(kernel)

    JITCallable.parse = in_turn
    try:
        yield
    finally:
        JITCallable.parse = parse


class _Counting(Executor):
    """A pool of threads that counts what it is given."""

    def __init__(self, threads: Executor, step: Callable[[], None]) -> None:
        self.submitted, self._threads, self._step = 0, threads, step

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        self.submitted += 1
        future = self._threads.submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._step())
        return future


class _Sized(MockTensor):
    """Stands for a tensor of so many bytes: AMD's compiler treats those below 2 GiB differently."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype)
        self._bytes = tensor.numel() * tensor.element_size()

    def ptr_range(self) -> int:
        return self._bytes


def compile_on(where: torch.device, launches: list[Launch], jobs: int) -> int:
    """Compile for the GPU `where` is, into this process; what was compiled before is only loaded. How many were not."""
    with (
        torch.cuda.device(where),
        _one_parser_at_a_time(),
        Progress("compile", len(launches)) as bar,
        ThreadPoolExecutor(jobs) as threads,
        triton.AsyncCompileMode(counting := _Counting(threads, bar.step)),
    ):
        for launch in launches:
            arguments = [_Sized(value) if isinstance(value, torch.Tensor) else value for value in launch.args]
            launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options)
    return counting.submitted


def compile_for(device: Device, launches: list[Launch], jobs: int) -> int:
    """Compile for a GPU that need not be here, into Triton's cache on disk."""
    with (
        _one_parser_at_a_time(),
        Progress("compile", len(launches)) as bar,
        ThreadPoolExecutor(jobs) as threads,
    ):
        for future in [threads.submit(compile_launch, launch, device, instructions=False) for launch in launches]:
            future.result()
            bar.step()
    return len(launches)
