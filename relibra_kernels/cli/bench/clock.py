"""Milliseconds and memory of implementations that take turns, so that a busy machine slows all of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

from ...progress import Progress
from .layers import Layer
from .memory import begin_peak
from .peers import Run


@dataclass
class Figures:
    """The measurements of one implementation: seconds of each round; the peak of extra memory in bytes, where known."""

    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def record(self) -> dict[str, float | int | None]:
        return {
            "forward_ms": 1e3 * median(self.forward_s),
            "backward_ms": 1e3 * median(self.backward_s),
            "peak_bytes": self.peak_bytes,
        }


def measure(layer: Layer, runs: dict[str, Run], rounds: int) -> dict[str, Figures]:
    """Every implementation once to warm up, then `rounds` times in turns, forward and backward."""
    on_gpu = layer.x.is_cuda
    found = {name: Figures() for name in runs}
    with Progress("bench", (rounds + 1) * len(runs)) as progress:
        for number in range(rounds + 1):
            for name, run in runs.items():
                layer.clear()
                peak = begin_peak(layer.x.device)
                out, forward = _timed(on_gpu, lambda run=run: run(layer.x, layer.indices, layer.weights))  # type: ignore[misc]
                _, backward = _timed(on_gpu, lambda out=out: out.backward(layer.dout))  # type: ignore[misc]
                if number:
                    found[name].forward_s.append(forward)
                    found[name].backward_s.append(backward)
                    found[name].peak_bytes = peak()
                progress.step(name)
    layer.clear()
    return found


def _timed(on_gpu: bool, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    out = work()
    if on_gpu:
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def lines_of(found: dict[str, Figures], assignments: int, layer: Layer) -> list[str]:
    """A line an implementation; TFLOP/s of forward and backward, three products a weight."""
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    flops = 6 * assignments * (gate_up[0].numel() + down[0].numel())
    ours = _total(found["relibra"])
    lines = [f"{'implementation':26} {'forward ms':>22} {'backward ms':>22} {'TFLOP/s':>8} {'peak GB':>8} {'time':>7}"]
    for name, figures in found.items():
        peak = "-" if figures.peak_bytes is None else f"{figures.peak_bytes / 1e9:.3f}"
        lines.append(
            f"{name:26} {_spread(figures.forward_s):>22} {_spread(figures.backward_s):>22} "
            f"{flops / _total(figures) / 1e12:>8.2f} {peak:>8} {_total(figures) / ours:>6.2f}x"
        )
    return lines


def verdict(found: dict[str, Figures], peer: str) -> str:
    """What ours gain over `peer` in this layer, or that the rounds differ by more than the two do."""
    ours, theirs = (
        [forward + backward for forward, backward in zip(figures.forward_s, figures.backward_s, strict=True)]
        for figures in (found["relibra"], found[peer])
    )
    if max(ours) >= min(theirs) and max(theirs) >= min(ours):
        return f"over {peer}: no difference that the spread of the rounds lets see"
    ratio = _total(found[peer]) / _total(found["relibra"])
    less = "take less" if ratio > 1 else "take MORE"
    return f"over {peer}: ours {less} time, {ratio:.2f}x as fast; experts alone, not a whole step"


def _total(figures: Figures) -> float:
    return median(figures.forward_s) + median(figures.backward_s)


def _spread(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.2f} ({1e3 * min(seconds):.2f}-{1e3 * max(seconds):.2f})"
