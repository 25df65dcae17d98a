"""What no plain layer of one process launches: rows and replicas on their way to other ranks; adapters of experts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from relibra_kernels import kernels, reference
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.nn import ReplicatedExperts
from relibra_kernels.payload import PayloadLayout
from relibra_kernels.schedule import Schedule

from .correct import LAYER_TOLERANCE, TOLERANCE, check, errors, same_bits
from .layer_checks import backend

if TYPE_CHECKING:
    from .setting import Setting

RANKS, TOP_K, RANK = 4, 6, 16


def packed_replicas(setting: Setting) -> None:
    """Replicas packed for the push."""
    weights = setting.randn(5, setting.size(720, 20), setting.size(1432, 24), dtype=torch.float32)
    which = torch.tensor([4, 0, 2], dtype=torch.int32, device=setting.device)
    packed = [f.pack_replicas(weights, which, torch.bfloat16) for f in (kernels, reference)]
    found = errors(setting, {"packed": packed[0]}, {"packed": packed[1]})
    setting.report.figures(errors=found, worst_error=max(found.values()))
    check(setting, "packed replicas", found, TOLERANCE["bf16"])


def payload(setting: Setting) -> None:
    """Rows packed and taken apart to the bit; their gradients on the way back, added up, against float64."""
    worst = 0.0
    for hidden in setting.size((2880, 1431), (40,)):
        slots, send = _sent(setting, setting.size(1001, 9))
        token_of_row = send.assignment_of.long() // TOP_K
        x = setting.randn(len(send.position_of), hidden)
        weights = setting.randn(len(x), TOP_K, dtype=torch.float32)
        layout = PayloadLayout(hidden, TOP_K, x.dtype)
        rows = layout.new(len(slots), setting.device)
        kernels.pack_payload(x, weights, slots, send, rows)
        names = ("x", "weights", "slots")
        parts = dict(zip(names, kernels.unpack_payload(rows, layout), strict=True))
        dx = setting.randn(len(slots), hidden)
        dweights = setting.randn(len(slots), TOP_K, dtype=torch.float32).masked_fill(slots < 0, 0)
        back = layout._replace(has_slots=False)
        returned = back.new(len(slots), setting.device)
        kernels.pack_gradients(dx, dweights, returned)
        sums = [kernels.unpack_gradients(returned, send, back) for _ in range(2)]
        first, second = (dict(zip(("dx", "dweights"), both, strict=True)) for both in sums)
        same_bits("payload", parts, {"x": x[token_of_row], "weights": weights[token_of_row], "slots": slots})
        same_bits("gradients of a payload", first, second)
        exact = {
            "dx": x.new_zeros(x.shape, dtype=torch.float64).index_add_(0, token_of_row, dx.double()),
            "dweights": x.new_zeros(len(x), TOP_K, dtype=torch.float64).index_add_(0, token_of_row, dweights.double()),
        }
        found = errors(setting, first, exact)
        worst = max(worst, *found.values())
        setting.report.figures(errors=found, worst_error=worst, tolerance=TOLERANCE["bf16"])
        check(setting, f"payload of H {hidden}", found, TOLERANCE["bf16"])
    setting.report.figures(same_bits=True)


def _sent(setting: Setting, tokens: int) -> tuple[torch.Tensor, Schedule]:
    """(int16 [N, K], the rows): one row a token and rank that it goes to, some choices go nowhere."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.randint(-1, RANKS, (tokens, TOP_K), generator=generator)
    slot = torch.randint(0, 300, (tokens, TOP_K), generator=generator).to(torch.int16)
    visits = torch.stack([rank == r for r in range(RANKS)])  # [R, T, K]
    to, token = visits.any(2).nonzero(as_tuple=True)
    chosen = visits[to, token]
    first = chosen.int().argmax(1)
    position = torch.full((tokens, TOP_K), -1, dtype=torch.int32)
    position[token, first] = torch.arange(len(token), dtype=torch.int32)
    slots = torch.where(chosen, slot[token], -1).to(torch.int16)
    offsets = torch.tensor([0, len(token)], dtype=torch.int32)
    assignment = (token * TOP_K + first).int()
    where = setting.device
    return slots.to(where), Schedule(offsets.to(where), assignment.to(where), position.to(where))


def adapters(setting: Setting) -> None:
    """Low-rank terms beside frozen weights: output, dx and the factors' gradients against float64, twice."""
    worst = 0.0
    for name, form in {"qwen": ExpertForm(), "gpt-oss": GPT_OSS}.items():
        experts, inputs = adapted_experts(setting, form)
        exact = copy.deepcopy(experts).double()
        with backend("reference"):
            expected = _trained(exact, *(t.double() if t.is_floating_point() else t for t in inputs))
        first, second = (_trained(experts, *inputs) for _ in range(2))
        found = errors(setting, first, expected)
        worst = max(worst, *found.values())
        setting.report.figures(**{name: found}, worst_error=worst, tolerance=LAYER_TOLERANCE["bf16"])
        check(setting, f"adapters of {name}", found, LAYER_TOLERANCE["bf16"])
        same_bits(f"adapters of {name}", first, second)
    setting.report.figures(same_bits=True)


def adapted_experts(setting: Any, form: ExpertForm) -> tuple[ReplicatedExperts, tuple[torch.Tensor, ...]]:
    """Experts with factors that are not zero, and (x, top_k_index, top_k_weights, dout)."""
    tokens, hidden, half, rank = setting.size((1001, 1432, 360, RANK), (13, 24, 20, 3))
    experts = ReplicatedExperts(7, hidden, half, form=form, dtype=torch.bfloat16, device=setting.device)
    experts.adapt(rank)
    for name, parameter in experts.named_parameters():
        nn.init.normal_(parameter, std=1.0 if "bias" in name else 0.3 if "_right" in name else hidden**-0.5)
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, 7, generator=generator).topk(3).indices.to(setting.device)
    x, dout = (torch.randn(tokens, hidden, generator=generator).bfloat16().to(setting.device) for _ in range(2))
    weights = torch.randn(tokens, 3, generator=generator).bfloat16().to(setting.device)
    return experts, (x, index, weights, dout)


def _trained(
    experts: ReplicatedExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    experts.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = experts(x, index, weights)
    out.backward(dout)
    grads = {name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None}
    assert x.grad is not None and len(grads) == 4, sorted(grads)
    return {"out": out.detach(), "dx": x.grad, **grads}
