"""What one batch cost on one rank: bytes by kind and network, seconds by part."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.profiler import record_function

PARTS = ("dispatch", "compute", "combine", "replica", "live", "migration", "tables")


class Ledger:
    """Counters that the runtime writes as it goes.

    On CUDA, seconds are those between two events of the current stream, read only when asked for; elsewhere those of
    the host's clock.
    """

    def __init__(self) -> None:
        self.bytes_sent: Counter[tuple[str, str]] = Counter()  # (kind, "fast" | "slow") -> bytes to other ranks
        self._bytes_before: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add_bytes(self, kind: str, fast: bool, count: int) -> None:
        self.bytes_sent[kind, "fast" if fast else "slow"] += count

    def span(self, part: str, device: torch.device) -> AbstractContextManager[None]:
        """Count the time within as `part`, and show it as a range of `torch.profiler` where one runs."""
        span = _DeviceSpan(part, self._events) if device.type == "cuda" else _HostSpan(part, self._seconds)
        return _shown(span, part) if torch.autograd._profiler_enabled() else span

    def seconds(self) -> dict[str, float]:
        """By part; waits for the device."""
        for part, begin, end in self._events:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self._seconds)

    def begin_batch(self) -> None:
        """What follows belongs to a new batch; `bytes_sent` goes on counting."""
        self._bytes_before = Counter(self.bytes_sent)
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events.clear()

    def batch_bytes(self) -> Counter[tuple[str, str]]:
        """`bytes_sent` since the batch began."""
        return self.bytes_sent - self._bytes_before


class _HostSpan(AbstractContextManager[None]):
    """Seconds of the host's clock. A class: a layer has ten spans, and a generator would cost more than it times."""

    def __init__(self, part: str, seconds: dict[str, float]):
        self._part, self._seconds = part, seconds

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._part] += time.perf_counter() - self._start


class _DeviceSpan(AbstractContextManager[None]):
    """Two events of the current stream."""

    def __init__(self, part: str, events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]):
        self._part, self._events = part, events

    def __enter__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def __exit__(self, *_: object) -> None:
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._events.append((self._part, self._begin, end))


@contextmanager
def _shown(span: AbstractContextManager[None], part: str) -> Iterator[None]:
    with record_function(f"relibra::{part}"), span:
        yield
