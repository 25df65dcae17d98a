"""One layer with replicas and dropped assignments: run by the two functions, and by the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from relibra_kernels import kernels, reference
from relibra_kernels.autograd import moe_mlp_backward, moe_mlp_forward
from relibra_kernels.form import ExpertForm
from relibra_kernels.schedule import Schedule
from relibra_kernels.weights import ExpertWeights

from .problems import DTYPES, FORMS
from .setting import Setting

HOME, REPLICAS, TOP_K = 5, 2, 3


@dataclass
class LayerProblem:
    """Inputs in fp32. Slots are the home experts, one more slot of home expert 1, and the replicas.

    Attributes:
        slots: `[T, K]`, -1 where dropped. table: slot -> index into home, then replica. rows: not dropped.
    """

    form: ExpertForm
    x: torch.Tensor
    weights: torch.Tensor
    dout: torch.Tensor
    stores: ExpertWeights
    slots: torch.Tensor
    table: torch.Tensor
    rows: int

    @classmethod
    def make(
        cls, setting: Setting, form: str, tokens: int, hidden: int, half: int, *, dropped: float = 0.1
    ) -> LayerProblem:
        """Values that all dtypes can hold: what is compared is the arithmetic, not the rounding of inputs."""
        of, where = FORMS[form], setting.device
        generator = torch.Generator().manual_seed(tokens)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            if where.type == "meta":
                return torch.empty(shape, device=where)
            values = torch.randn(shape, generator=generator) * scale
            return values.to(torch.bfloat16).to(where, torch.float32)

        count = HOME + REPLICAS
        shapes: list[tuple[tuple[int, ...], float]]
        shapes = [(of.gate_up_shape(hidden, half), hidden**-0.5), (of.down_shape(hidden, half), half**-0.5)]
        shapes += [((2 * half,), 1.0), ((hidden,), 1.0)] if of.has_bias else []
        stores = ExpertWeights(*(normal(count, *shape, scale=scale) for shape, scale in shapes))
        table = torch.tensor([*range(HOME), 1, *range(HOME, count)], dtype=torch.int32, device=where)
        slots = torch.rand(tokens, len(table), generator=generator).topk(TOP_K).indices
        slots[torch.rand(tokens, TOP_K, generator=generator) < dropped] = -1
        slots[slots == 3] = -1  # a slot without rows
        x, dout, weights = normal(tokens, hidden), normal(tokens, hidden), normal(tokens, TOP_K)
        return cls(of, x, weights, dout, stores, slots.to(where), table, int((slots >= 0).sum()))


def run_layer(
    problem: LayerProblem,
    dtype: str,
    *,
    accumulate: bool = True,
    recompute: bool = False,
    exact_rows: bool = False,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Every output of forward and backward. `offset`: elements before each weight's first, in its memory."""
    rows = problem.rows if exact_rows else None
    return _run(problem, DTYPES[dtype], kernels.build_schedule, accumulate, recompute, rows, offset)


def exact_layer(problem: LayerProblem, h: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """`h`: what backward starts from. A clamp's gradient is 0 or 1: only of the same h are both sides the same."""
    with backend("reference"):
        return _run(problem, torch.float64, reference.build_schedule, True, False, None, 0, h)


def _run(
    problem: LayerProblem,
    dtype: torch.dtype,
    build: Callable[..., Schedule],
    accumulate: bool,
    recompute: bool,
    rows: int | None,
    offset: int,
    given_h: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    def placed(tensor: torch.Tensor) -> torch.Tensor:
        if not offset:
            return tensor.to(dtype)
        memory = torch.empty(tensor.numel() + offset, dtype=dtype, device=tensor.device)
        view = memory[offset:].view(tensor.shape)
        return view.copy_(tensor)

    home = problem.stores.map(lambda tensor: placed(tensor[:HOME]))
    replica = problem.stores.map(lambda tensor: placed(tensor[HOME:]))
    x, weights, dout = (tensor.to(dtype) for tensor in (problem.x, problem.weights, problem.dout))
    schedule = build(problem.slots, len(problem.table), num_rows=rows)
    how: dict[str, Any] = {"replica": replica, "weight_of_slot": problem.table}
    out, h = moe_mlp_forward(x, weights, schedule, home, problem.form, **how)
    sums = torch.promote_types(dtype, torch.float32) if accumulate else dtype
    begin = 0.0 if accumulate else float("nan")
    grad, replica_grad = (store.map(lambda t: torch.full_like(t, begin, dtype=sums)) for store in (home, replica))
    how |= {"grad": grad, "replica_grad": replica_grad, "accumulate": accumulate}
    kept = None if recompute else h if given_h is None else torch.cat([given_h.to(dtype), h[len(given_h) :]])
    dx, dweights = moe_mlp_backward(dout, x, kept, weights, schedule, home, problem.form, **how)
    named = zip(ExpertWeights._fields, grad, replica_grad, strict=True)
    found = {f"d_{name}": torch.cat([a, b]) for name, a, b in named if a is not None}
    return {"out": out, "h": h[: problem.rows], "dx": dx, "dweights": dweights, **found}


@contextmanager
def backend(name: str) -> Iterator[None]:
    before = os.environ.get("RELIBRA_BACKEND")
    os.environ["RELIBRA_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["RELIBRA_BACKEND"]
        else:
            os.environ["RELIBRA_BACKEND"] = before
