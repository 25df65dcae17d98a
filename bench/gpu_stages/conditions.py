"""What must hold of a step on a GPU besides its figures: streams, devices, no waiting, no compiling, graphs.

In a rehearsal the same steps run, with nothing of a GPU about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import nn

from relibra_kernels import warmup
from relibra_kernels.form import GPT_OSS
from relibra_kernels.nn import ReplicatedExperts, ReplicatedMoE, TopKRouter

from .case import Wrong
from .correct import same_bits
from .layer_checks import LayerProblem, run_layer

if TYPE_CHECKING:
    from .setting import Setting


def _block(setting: Setting, device: Any = None, **how: Any) -> ReplicatedMoE:
    hidden, half, experts, top_k = setting.size((2048, 768, 16, 8), (32, 16, 4, 2))
    router = TopKRouter(hidden, experts, top_k)
    nn.init.normal_(router.weight, std=0.1)
    block = ReplicatedMoE(router, ReplicatedExperts(experts, hidden, half, **how))
    return block.to(device or setting.device, torch.bfloat16)


def _step(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    block.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = block(x)
    out.backward(torch.ones_like(out))
    found = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "dx": x.grad, **found}


def second_stream(setting: Setting) -> None:
    """The same bits on a stream that is not the default one, while the default one works."""
    problem = LayerProblem.make(setting, "gpt-oss", *setting.size((2047, 1432, 360), (13, 24, 20)))
    first = run_layer(problem, "bf16")
    setting.synchronize()
    stream = nullcontext() if setting.rehearse else torch.cuda.stream(torch.cuda.Stream())
    busy = setting.randn(setting.size(8192, 32), setting.size(8192, 32))
    for _ in range(setting.size(20, 1)):
        busy = busy @ busy * 1e-3
    with stream:
        second = run_layer(problem, "bf16")
    setting.synchronize()
    same_bits("second stream", first, second)
    setting.report.figures(same_bits=True, outputs=len(first))


def device_by_index(setting: Setting) -> None:
    """A model put on `cuda:0` by its index alone, by a process that never chose a device."""
    block = _block(setting, device=setting.size("cuda:0", "cpu"))
    x = torch.randn(setting.size(777, 13), block.experts.hidden_size, device=setting.size("cuda:0", "cpu")).bfloat16()
    first, second = _step(block, x), _step(block, x)
    same_bits("device by index", first, second)
    setting.report.figures(same_bits=True, device=str(first["out"].device))


def step_without_waiting(setting: Setting) -> None:
    """A step of the layer under `torch.cuda.set_sync_debug_mode("error")`: nothing waits for the device."""
    waited = {}
    hows: dict[str, dict[str, Any]] = {"plain": {}, "recompute": {"recompute": True}, "gpt-oss": {"form": GPT_OSS}}
    for name, how in hows.items():
        block = _block(setting, **how)
        x = setting.randn(setting.size(2048, 12), block.experts.hidden_size)
        _step(block, x)
        setting.synchronize()
        try:
            with _nothing_waits(setting):
                _step(block, x)
            waited[name] = "no"
        except RuntimeError as error:
            waited[name] = str(error)[:200]
        setting.report.figures(**waited)
    if any(value != "no" for value in waited.values()):
        raise Wrong(f"a step waits for the device: {waited}")


@contextmanager
def _nothing_waits(setting: Setting) -> Iterator[None]:
    if setting.rehearse:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_after_warmup(setting: Setting) -> None:
    """`warmup` for one number of tokens, then steps of that number and of some more of every parity: 0 compiled."""
    block = _block(setting)
    tokens = setting.size(2048, 16)
    if not setting.rehearse:
        warmup(block, tokens)
    compiled: list[str] = []

    def count(**about: Any) -> None:
        compiled.append(str(getattr(about.get("fn"), "name", "a kernel")))

    triton.knobs.runtime.jit_post_compile_hook = count
    for more in range(setting.size(8, 2)):
        _step(block, setting.randn(tokens + more, block.experts.hidden_size))
    setting.report.figures(compiled=len(compiled), which=sorted(set(compiled)), steps=setting.size(8, 2))
    if compiled:
        raise Wrong(f"{len(compiled)} kernels were compiled after warmup: {sorted(set(compiled))}")


def graph_of_a_layer(setting: Setting) -> None:
    """Forward and backward captured once; replayed on other inputs and other routing with the bits of an eager step."""
    block = _block(setting)
    tokens, hidden = setting.size(2048, 12), block.experts.hidden_size
    first, other = setting.randn(tokens, hidden), setting.randn(tokens, hidden)
    expected = {name: tensor.clone() for name, tensor in _step(block, other).items()}
    if setting.rehearse:
        setting.report.figures(captured="no: there is no graph in a rehearsal", same_bits=True)
        return
    side, held = torch.cuda.Stream(), first.clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(block, held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _step(block, held)
    setting.report.figures(captured="yes")
    held.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    same_bits("a replayed graph", found, expected)
    setting.report.figures(same_bits=True)
