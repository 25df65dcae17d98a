"""How fast is a layer, forward and backward apart, and beside its peers on the same inputs in the same process."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from .case import Case, Missing, Wrong
from .shares import LAYER_TOKENS, SHARES, SKEWS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from relibra_kernels.cli.bench.layers import Layer, Model

    from .setting import Setting

# the dearest last: those compile and time for themselves
PEERS = ("grouped_mm", "transformers grouped_mm", "loop", "transformers eager", "scattermoe", "sonic-moe", "liger")
PLAIN_ONLY = ("transformers grouped_mm", "transformers eager", "scattermoe", "sonic-moe", "liger")
REHEARSED = ("grouped_mm", "transformers grouped_mm", "liger")
ROUNDS = 9
PEER_TOLERANCE = 2e-2


def cases(rehearse: bool) -> list[Case]:
    found = [Case("peaks", "smoke.peaks", seconds=40, rehearsed=False)]
    for share in SHARES:
        options: dict[str, Any] = {"model": share.model, "experts": share.experts}
        found.append(Case(f"ours {share.model}", "ours", options, 60, rehearsed=share == SHARES[0]))
    for peer in PEERS:
        for share in SHARES:
            if peer in PLAIN_ONLY and share.model.startswith("gpt-oss"):
                continue
            options = {"model": share.model, "experts": share.experts, "peer": peer}
            rehearsed = share == SHARES[0] and peer in REHEARSED
            name = f"{peer}, {share.model}"
            found.append(Case(name, "versus", options, 75, may_miss=True, rehearsed=rehearsed))
    return found


def _layer(setting: Setting, model: str, experts: int, skew: float) -> tuple[Model, Layer]:
    import torch

    from relibra_kernels.cli.bench.layers import make_layer

    from .problems import model_of

    of = model_of(setting, model)
    tokens = setting.size(LAYER_TOKENS, 6)
    count = setting.size(experts, 4)
    made = make_layer(of, tokens, skew, num_experts=count, dtype=torch.bfloat16, device=str(setting.device))
    return of, made


def _step(run: Callable[..., torch.Tensor], layer: Layer) -> None:
    layer.clear()
    run(layer.x, layer.indices, layer.weights).backward(layer.dout)


def _backward(out: torch.Tensor, layer: Layer) -> None:
    layer.clear()
    out.backward(layer.dout)


def _flops(model: Model, layer: Layer) -> int:
    """Of a forward; backward has twice as many."""
    return 2 * layer.indices.numel() * 3 * model.hidden_size * model.intermediate_size


def ours(setting: Setting, model: str, experts: int) -> None:
    """Medians by events, what the host makes of them, a graph of the step, memory, and the same thing timed twice."""
    all_found: dict[str, dict[str, Any]] = {}
    for name, skew in setting.size(SKEWS, {"skewed": 1.1}).items():
        of, layer = _layer(setting, model, experts, skew)
        run, flops = layer.experts, _flops(of, layer)
        for _ in range(2):
            _step(run, layer)
        memory = _memory(setting, run, layer)
        forward, backward = setting.clock.apart(
            lambda: run(layer.x, layer.indices, layer.weights),  # noqa: B023
            lambda out: _backward(out, layer),  # noqa: B023
            ROUNDS,
        )
        turns = setting.clock.in_turns({"a": lambda: _step(run, layer), "b": lambda: _step(run, layer)}, ROUNDS)  # noqa: B023
        a, b = (median(turns[key]) for key in "ab")
        found: dict[str, Any] = {
            "forward_ms": 1e3 * forward.median,
            "forward_tflops": flops / forward.median / 1e12,
            "backward_ms": 1e3 * backward.median,
            "backward_tflops": 2 * flops / backward.median / 1e12,
            "step_ms": 1e3 * a,
            "spread": (max(turns["a"]) - min(turns["a"])) / a,
            "same_again": b / a,
            "host_inclusive_ms": 1e3 * setting.clock.on_the_host(lambda: _step(run, layer), setting.size(10, 1)),  # noqa: B023
            **memory,
        }
        if setting.known:
            least = _least_seconds(setting, of, layer, flops)
            found["roofline"] = least / a
        setting.report.figures(**{name: found})
        all_found[name] = found
    for name, found in all_found.items():  # last: a capture that fails may take the process with it
        _, layer = _layer(setting, model, experts, SKEWS[name])
        try:
            graph = setting.clock.replayed(lambda: _step(layer.experts, layer))  # noqa: B023
            found["graph_ms"] = 1e3 * graph.median
        except RuntimeError as error:
            found["graph_ms"] = f"not captured: {error}"[:200]
        setting.report.figures(**{name: found})


def _least_seconds(setting: Setting, model: Model, layer: Layer, flops: int) -> float:
    """Weights read three times and their gradients written; x, dout, out and dx; h written once and read twice."""
    weights = sum(parameter.numel() for parameter in layer.experts.parameters())
    rows = layer.indices.numel()
    traffic = 2 * (4 * weights + 4 * layer.x.numel() + 3 * rows * 2 * model.intermediate_size)
    return max(3 * flops / setting.known["matmul_tflops"], traffic / setting.known["copy_tbs"]) / 1e12


def _memory(setting: Setting, run: Callable[..., torch.Tensor], layer: Layer) -> dict[str, float]:
    """Peak of a step beyond what lies there before, and what a forward keeps for its backward, a token."""
    import torch

    tokens = len(layer.x)
    if setting.rehearse:
        kept = sum(t.numel() * t.element_size() for t in (layer.x, layer.weights, layer.indices))
        return {"peak_mib": kept / 2**20, "kept_bytes_a_token": kept / tokens}
    layer.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(layer.x, layer.indices, layer.weights)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    out.backward(layer.dout)
    torch.cuda.synchronize()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20, "kept_bytes_a_token": kept / tokens}


def versus(setting: Setting, model: str, experts: int, peer: str) -> None:
    """One peer and us in turns, and us once more; ratios above 1 are in our favour. What is wrong is not timed."""
    from relibra_kernels.cli.bench.peers import PEERS as BUILD
    from relibra_kernels.cli.bench.peers import Unsuitable

    for name, skew in setting.size(SKEWS, {"skewed": 1.1}).items():
        _, layer = _layer(setting, model, experts, skew)
        try:
            theirs = BUILD[peer](layer.experts)
        except (ImportError, Unsuitable) as error:
            raise Missing(f"{peer}: {error}") from None
        with setting.report.compiling(peer):
            difference = _difference(layer, theirs)
        if not difference < PEER_TOLERANCE:
            setting.report.figures(**{name: {"difference": difference}})
            raise Wrong(f"{peer} differs from us by {difference:.2g}")
        runs: dict[str, Callable[..., torch.Tensor]] = {
            "ours": layer.experts,
            "theirs": theirs,
            "ours again": layer.experts,
        }
        forward = setting.clock.in_turns(
            {key: partial(run, layer.x, layer.indices, layer.weights) for key, run in runs.items()}, ROUNDS
        )
        step = setting.clock.in_turns({key: partial(_step, run, layer) for key, run in runs.items()}, ROUNDS)
        found: dict[str, Any] = {"difference": difference}
        for what, turns in (("forward", forward), ("step", step)):
            middle = {key: median(seconds) for key, seconds in turns.items()}
            found |= {
                f"{what}_ms": 1e3 * middle["theirs"],
                f"our_{what}_ms": 1e3 * middle["ours"],
                f"{what}_ratio": middle["theirs"] / middle["ours"],
                f"{what}_noise": middle["ours again"] / middle["ours"],
            }
        setting.report.figures(**{name: found})


def _difference(layer: Layer, theirs: Callable[..., torch.Tensor]) -> float:
    """The largest relative difference of the output and of dx, twice: the second time all is compiled."""
    found = []
    for run in (layer.experts, theirs, theirs):
        layer.clear()
        out = run(layer.x, layer.indices, layer.weights)
        out.backward(layer.dout)
        assert layer.x.grad is not None
        found.append((out.detach().double(), layer.x.grad.double()))
    layer.clear()
    return max(float((a - b).norm() / a.norm()) for a, b in zip(found[0], found[2], strict=True))
