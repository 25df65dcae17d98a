"""What a profiler's trace says of a step: launches, how busy the device was, and where it waited."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MOST_GAPS = 5


def profiled(step: Callable[[], object], path: Path, *, on_gpu: bool) -> dict[str, Any]:
    """One profiled call of `step`, which ran before; its trace is written to `path`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return timeline(json.loads(path.read_text())["traceEvents"], ON_THE_DEVICE if on_gpu else ("cpu_op",))


def timeline(events: Iterable[dict[str, Any]], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Counts, and in milliseconds: the span from the first to the last event, how much of it was busy, the gaps."""
    ours = sorted((e for e in events if e.get("cat") in kinds and "dur" in e), key=lambda e: e["ts"])
    if not ours:
        return {"launches": 0, "span_ms": 0.0, "busy_ms": 0.0, "idle_ms": 0.0, "longest_gaps": [], "most_time": []}
    gaps: list[tuple[float, str]] = []
    end, busy, by_name = ours[0]["ts"], 0.0, Counter[str]()
    for event in ours:
        begin, until = event["ts"], event["ts"] + event["dur"]
        by_name[event["name"][:60]] += event["dur"]
        if begin > end:
            gaps.append((begin - end, event["name"][:60]))
        busy += max(0.0, until - max(begin, end))
        end = max(end, until)
    span = end - ours[0]["ts"]
    return {
        "launches": sum(event["cat"] in ("kernel", "cpu_op") for event in ours),
        "copies": sum(event["cat"] in ("gpu_memcpy", "gpu_memset") for event in ours),
        "span_ms": span / 1e3,
        "busy_ms": busy / 1e3,
        "idle_ms": (span - busy) / 1e3,
        "longest_gaps": [{"ms": ms / 1e3, "before": name} for ms, name in sorted(gaps, reverse=True)[:MOST_GAPS]],
        "most_time": [{"ms": ms / 1e3, "name": name} for name, ms in by_name.most_common(12)],
    }
