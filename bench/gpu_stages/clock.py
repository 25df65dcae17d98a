"""Times of calls on a GPU, and a clock of a rehearsal that runs everything and makes the times up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]
SHORT = 200e-6  # seconds; below, the host is slower than the device, and a graph is replayed
_LAUNCHES, _REPLAYS = 20, 12


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, 20th and 80th percentile; `how` is events, graph or fake."""

    median: float
    low: float
    high: float
    how: str

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.median

    def figures(self) -> dict[str, float | str]:
        """In microseconds."""
        return {"us": 1e6 * self.median, "low": 1e6 * self.low, "high": 1e6 * self.high, "how": self.how}


def times_of(seconds: Sequence[float], how: str) -> Times:
    if len(seconds) == 1:
        return Times(seconds[0], seconds[0], seconds[0], how)
    cuts = quantiles(seconds, n=10, method="inclusive")
    return Times(cuts[4], cuts[1], cuts[7], how)


class GpuClock:
    """CUDA events around single calls, with L2 written over before each; short ones by graph replay."""

    def __init__(self) -> None:
        bytes_of_l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(2 * bytes_of_l2, 1 << 26), dtype=torch.int8, device="cuda")

    def of(self, calls: Sequence[Call], *, seconds: float = 0.15, rounds: int = 30) -> Times:
        """The same launch on one set of inputs after the other; compiled before. At most `rounds`, or `seconds`."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        rough = self._by_events(calls, 3)
        if min(rough) < SHORT:
            try:
                return self._by_graph(calls)
            except RuntimeError:  # it waits for the device: no graph
                torch.cuda.synchronize()
        count = max(5, min(rounds, int(seconds / max(min(rough), 1e-6))))
        return times_of(self._by_events(calls, count), "events")

    def in_turns(self, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds of every call by name, round by round, so that a change of clocks meets all of them."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name] += self._by_events([call], 1)
        return found

    def apart(self, first: Callable[[], T], then: Callable[[T], object], rounds: int) -> tuple[Times, Times]:
        """Of `first` and of `then` with its result, each by itself."""
        marks = []
        for _ in range(rounds):
            self._flush.zero_()
            at = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            at[0].record()
            result = first()
            at[1].record()
            then(result)
            at[2].record()
            marks.append(at)
        torch.cuda.synchronize()
        parts = [[at[i].elapsed_time(at[i + 1]) / 1e3 for at in marks] for i in range(2)]
        return times_of(parts[0], "events"), times_of(parts[1], "events")

    def on_the_host(self, call: Call, count: int) -> float:
        """Seconds a call, with all that the host does, of `count` one after the other."""
        call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    def replayed(self, call: Call) -> Times:
        """Of one graph of one call. Raises RuntimeError where it cannot be captured."""
        return self._by_graph([call], launches=1)

    def _by_events(self, calls: Sequence[Call], count: int) -> list[float]:
        pairs = []
        for number in range(count):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            calls[number % len(calls)]()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]

    def _by_graph(self, calls: Sequence[Call], launches: int = _LAUNCHES) -> Times:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(launches):
                calls[number % len(calls)]()
        seconds = [of / launches for of in self._by_events([graph.replay], _REPLAYS)]
        return times_of(seconds, "graph")


class FakeClock:
    """Runs every call once and says a time that depends on how many it has timed, with a spread of 2 %."""

    def __init__(self) -> None:
        self._timed = 0

    def of(self, calls: Sequence[Call], *, seconds: float = 0.15, rounds: int = 30) -> Times:
        for call in calls[:1]:
            call()
        return times_of([self._next() * (1 + 0.01 * k) for k in range(-1, 2)], "fake")

    def in_turns(self, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        found = {}
        for name, call in calls.items():
            call()
            found[name] = [self._next() * (1 + 0.01 * k) for k in range(-1, 2)]
        return found

    def apart(self, first: Callable[[], T], then: Callable[[T], object], rounds: int) -> tuple[Times, Times]:
        then(first())
        return self.of([lambda: None]), self.of([lambda: None])

    def on_the_host(self, call: Call, count: int) -> float:
        call()
        return self._next()

    def replayed(self, call: Call) -> Times:
        return self.of([call])

    def _next(self) -> float:
        self._timed += 1
        return 1e-3 * (1 + self._timed % 7 / 10)
