"""What one batch cost on one rank: bytes by kind and network, seconds by part."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()
PARTS = ("dispatch", "compute", "combine", "replica", "live", "migration", "tables")


class Ledger:
    """Counters that the runtime writes as it goes.

    On CUDA, seconds are those between two events of the current stream, read only when asked for; elsewhere those of
    the host's clock. Layers are timed in some micro-batches only, whose seconds stand for all of them.
    """

    def __init__(self) -> None:
        self.bytes_sent: Counter[tuple[str, str]] = Counter()  # (kind, "fast" | "slow") -> bytes to other ranks
        self._bytes_before: Counter[tuple[str, str]] = Counter()
        self._of_batch, self._of_layers = _Seconds(), _Seconds()
        self._passes = self._timed = 0  # over micro-batches: all, and those whose layers are timed

    def add_bytes(self, kind: str, fast: bool, count: int) -> None:
        self.bytes_sent[kind, "fast" if fast else "slow"] += count

    def span(self, part: str, device: torch.device) -> AbstractContextManager[None]:
        """Count the time within as `part`, and show it as a range of `torch.profiler` where one runs."""
        return _shown(self._of_batch.span(part, device), part)

    def layer_span(self, part: str, device: torch.device, timed: bool) -> AbstractContextManager[None]:
        """As `span`, for a part of a layer; its seconds count only where the micro-batch is timed."""
        if not timed and not torch.autograd._profiler_enabled():
            return _NOTHING
        return _shown(self._of_layers.span(part, device) if timed else _NOTHING, part)

    def begin_pass(self, timed: bool) -> None:
        """A micro-batch opens, whose layers are timed or not."""
        self._passes += 1
        self._timed += timed

    @property
    def layers_timed(self) -> bool:
        """Whether layers were timed in any micro-batch of the batch."""
        return self._timed > 0

    def seconds(self) -> dict[str, float]:
        """By part; waits for the device."""
        whole, layers = self._of_batch.read(), self._of_layers.read()
        scale = self._passes / self._timed if self._timed else 0.0
        return {part: whole[part] + scale * layers[part] for part in PARTS}

    def begin_batch(self) -> None:
        """What follows belongs to a new batch; `bytes_sent` goes on counting."""
        self._bytes_before = Counter(self.bytes_sent)
        self._of_batch, self._of_layers = _Seconds(), _Seconds()
        self._passes = self._timed = 0

    def batch_bytes(self) -> Counter[tuple[str, str]]:
        """`bytes_sent` since the batch began."""
        return self.bytes_sent - self._bytes_before


class _Seconds:
    """Sums by part, and the events that are not read yet."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def span(self, part: str, device: torch.device) -> AbstractContextManager[None]:
        return _DeviceSpan(part, self._events) if device.type == "cuda" else _HostSpan(part, self._sums)

    def read(self) -> dict[str, float]:
        for part, begin, end in self._events:
            end.synchronize()
            self._sums[part] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return self._sums


class _HostSpan(AbstractContextManager[None]):
    """Seconds of the host's clock."""

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


def _shown(span: AbstractContextManager[None], part: str) -> AbstractContextManager[None]:
    return _in_profile(span, part) if torch.autograd._profiler_enabled() else span


@contextmanager
def _in_profile(span: AbstractContextManager[None], part: str) -> Iterator[None]:
    with record_function(f"relibra::{part}"), span:
        yield
