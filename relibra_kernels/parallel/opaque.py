"""The expert-parallel layer as operators that torch.compile does not look into: one graph, with `fullgraph=True` too.

An operator finds its layer by a number. What its forward saves stays here, under another number, until its backward
takes it.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..weights import ExpertWeights
from .tokens.layer import Experts

_LAYERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_SAVED: dict[int, tuple[list[Tensor], Tensor]] = {}  # (x, gate weights, expert weights; output) of a forward


def register(layer: Any) -> int:
    """A number under which operators find `layer`, an `AttachedLayer`, as long as it lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


def run(handle: int, weights: ExpertWeights, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The layer's experts: [T, H]."""
    keep = torch.is_grad_enabled()
    out, _ = _run(x_TH, index_TK, weights_TK, list(weights.tensors()), handle, keep)
    return out


def recorded(handle: int, logits_TE: Tensor, top_k: int) -> Tensor:
    """int64 [T, K], -1 where the router is to choose."""
    return _recorded(logits_TE, handle, top_k)


def _experts_of(layer: Any) -> Experts:
    experts = layer.module()
    return Experts(experts.form, experts.recompute, experts.weights)


def _autograd_within() -> Any:
    """Turn autograd on within the block: an operator runs below it, where nothing is recorded."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


@torch.library.custom_op("relibra::expert_parallel", mutates_args=())
def _run(
    x: Tensor, index: Tensor, gates: Tensor, weights: list[Tensor], handle: int, keep: bool
) -> tuple[Tensor, Tensor]:
    layer = _LAYERS[handle]
    number = next(_NUMBERS)
    if not keep:
        return layer.run(_experts_of(layer), x, index, gates), torch.tensor(number)
    with torch.enable_grad(), _autograd_within():
        own = _experts_of(layer)
        inputs = [tensor.detach().requires_grad_() for tensor in (x, gates)]
        out = layer.run(own, inputs[0], index, inputs[1])
    _SAVED[number] = [*inputs, *own.weights.tensors()], out
    return out.detach().clone(), torch.tensor(number)


@_run.register_fake
def _(x: Tensor, index: Tensor, gates: Tensor, weights: list[Tensor], handle: int, keep: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("relibra::expert_parallel_backward", mutates_args=())
def _back(dout: Tensor, number: Tensor, x: Tensor, gates: Tensor, weights: list[Tensor]) -> list[Tensor]:
    inputs, out = _SAVED.pop(int(number))
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    with _autograd_within():
        found = iter(torch.autograd.grad(out, trained, dout, allow_unused=True))
    grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
    return [torch.zeros_like(tensor) if grad is None else grad for grad, tensor in zip(grads, inputs, strict=True)]


@_back.register_fake
def _(dout: Tensor, number: Tensor, x: Tensor, gates: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, gates, *weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, gates, weights, _, _ = inputs
    ctx.save_for_backward(output[1], x, gates, *weights)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    number, x, gates, *weights = ctx.saved_tensors
    dx, dgates, *of_weights = _back(dout, number, x, gates, weights)
    return dx, None, dgates, list(of_weights), None, None


torch.library.register_autograd("relibra::expert_parallel", _backward, setup_context=_save)


@torch.library.custom_op("relibra::recorded_routing", mutates_args=())
def _recorded(scores: Tensor, handle: int, top_k: int) -> Tensor:
    layer = _LAYERS[handle]
    found = layer.runner.recorded(layer.layer)
    if found is None:
        return torch.full((len(scores), top_k), -1, dtype=torch.int64, device=scores.device)
    return found[0].clone()


@_recorded.register_fake
def _(scores: Tensor, handle: int, top_k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], top_k), dtype=torch.int64)
