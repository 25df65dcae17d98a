"""One layer's inputs in every routing shape and form, its float64 oracle, and a run of the two plain functions."""

from dataclasses import dataclass

import torch
from oracle import moe_mlp_oracle
from routing import routing_cases

from relibra_kernels.autograd import moe_mlp_backward, moe_mlp_forward
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.ops import build_schedule
from relibra_kernels.weights import ExpertWeights

H, I = 24, 20  # noqa: E741
CASES = routing_cases()
REPLICAS = next(case for case in CASES if case.num_replicas)  # and several slots of one weight
FORMS = {
    "qwen": ExpertForm(),
    "bias": ExpertForm(has_bias=True),
    "interleaved": ExpertForm(is_concatenated=False),
    "transposed": ExpertForm(is_transposed=True),
    "clamped": ExpertForm(activation="clamped", limit=0.7),
    "gpt-oss": GPT_OSS,
    "clamped silu": ExpertForm(activation="clamped_silu", limit=0.7),
    "capped silu": ExpertForm(activation="capped_silu", limit=0.3),
    "gelu": ExpertForm(activation="gelu_tanh"),
    "no gate": ExpertForm(activation="relu2"),
    "no gate, transposed, bias": ExpertForm(is_transposed=True, has_bias=True, activation="relu2"),
}


@dataclass
class Problem:
    x: torch.Tensor
    weights: torch.Tensor
    dout: torch.Tensor
    stores: ExpertWeights  # home, then replica

    def home(self, case):
        return self.stores.map(lambda tensor: tensor[: case.num_home])

    def replica(self, case):
        return self.stores.map(lambda tensor: tensor[case.num_home :]) if case.num_replicas else None


def problem(case, form, dtype, seed=0, adapted=()):
    """`adapted`: the weights that have factors, of rank 3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    experts, tokens = case.num_home + case.num_replicas, case.slots.shape[0]
    biases = (normal(experts, form.width(I)), normal(experts, H)) if form.has_bias else (None, None)
    stores = ExpertWeights(
        normal(experts, *form.gate_up_shape(H, I), scale=0.5),
        normal(experts, *form.down_shape(H, I), scale=0.5),
        *biases,
    )
    for name in adapted:
        _, rows, columns = getattr(stores, name).shape
        factors = {f"{name}_left": normal(experts, rows, 3), f"{name}_right": normal(experts, 3, columns, scale=0.3)}
        stores = stores._replace(**factors)
    return Problem(normal(tokens, H), normal(*case.slots.shape), normal(tokens, H), stores)


def oracle(case, form, p):
    """(out, dx, dweights, gradients of the stores), in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (p.x, p.weights, *p.stores.tensors())]
    x, weights, *stores = leaves
    named = iter(stores)
    whole = ExpertWeights(*(None if tensor is None else next(named) for tensor in p.stores)).merged()
    out = moe_mlp_oracle(x, weights, case.slots, form, *whole[:4], weight_of_slot=case.weight_of_slot)
    grads = torch.autograd.grad(out, leaves, p.dout.double(), allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
    return out.detach(), grads[0], grads[1], grads[2:]


def run_functions(case, form, p, start=0.0, accumulate=True):
    """The two plain functions; gradient buffers begin at `start`, and are in p's dtype where they are overwritten."""
    schedule = build_schedule(case.slots, case.num_slots)
    home, replica = p.home(case), p.replica(case)
    how = {"replica": replica, "weight_of_slot": case.weight_of_slot}
    out, h = moe_mlp_forward(p.x, p.weights, schedule, home, form, **how)
    dtype = torch.promote_types(p.x.dtype, torch.float32) if accumulate else p.x.dtype
    buffers = p.stores.map(lambda t: torch.full_like(t, start, dtype=dtype))
    grad = buffers.map(lambda tensor: tensor[: case.num_home])
    replica_grad = buffers.map(lambda tensor: tensor[case.num_home :]) if replica else None
    dx, dweights = moe_mlp_backward(
        p.dout,
        p.x,
        h,
        p.weights,
        schedule,
        home,
        form,
        grad=grad,
        replica_grad=replica_grad,
        accumulate=accumulate,
        **how,
    )
    return out, dx, dweights, buffers.tensors()
