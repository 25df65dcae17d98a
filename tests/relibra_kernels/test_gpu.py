"""The kernels on a real GPU against the reference in float64 on the same device."""

import pytest
import torch
from layer_problem import CASES, FORMS, oracle, problem, run_functions
from tolerance import RELATIVE, assert_close

from relibra_kernels import kernels, reference
from relibra_kernels.autograd import moe_mlp_backward, moe_mlp_forward
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.weights import ExpertWeights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def to_gpu(case):
    table = None if case.weight_of_slot is None else case.weight_of_slot.cuda()
    return type(case)(case.name, case.slots.cuda(), case.num_slots, case.num_home, case.num_replicas, table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_routing_and_form(case, name, dtype):
    form = FORMS[name]
    p = problem(case, form, dtype)
    expected = oracle(case, form, p)
    q = type(p)(*(value.cuda() for value in (p.x, p.weights, p.dout)), p.stores.map(lambda tensor: tensor.cuda()))
    got = run_functions(to_gpu(case), form, q)
    for a, b in zip((*got[:3], *got[3]), (*expected[:3], *expected[3]), strict=True):
        assert_close(a.cpu(), b, RELATIVE[dtype])


@pytest.mark.parametrize("form", [ExpertForm(), GPT_OSS], ids=["qwen", "gpt-oss"])
def test_a_real_size_twice_with_the_same_bits(form):
    """2048 tokens, H 2880, I 768, 16 experts and 2 replicas: production tiles, no multiple of them."""
    torch.manual_seed(0)
    tokens, hidden, intermediate_size, home, replicas = 2048, 2880, 768, 14, 2
    slots = torch.rand(tokens, 16, device="cuda").topk(4).indices
    slots[::7, 1] = -1
    table = torch.tensor([*range(14), 14, 15], dtype=torch.int32, device="cuda")
    shapes = [form.gate_up_shape(hidden, intermediate_size), form.down_shape(hidden, intermediate_size)]
    shapes += [(2 * intermediate_size,), (hidden,)] if form.has_bias else []
    stores = ExpertWeights(*(torch.randn(16, *shape, device="cuda") * 0.05 for shape in shapes))
    x, dout, weights = (torch.randn(tokens, width, device="cuda") for width in (hidden, hidden, 4))

    def run(dtype, build):
        local = stores.map(lambda tensor: tensor.to(dtype))
        first, last = local.map(lambda tensor: tensor[:home]), local.map(lambda tensor: tensor[home:])
        schedule = build(slots, 16)
        how = {"replica": last, "weight_of_slot": table}
        out, h = moe_mlp_forward(x.to(dtype), weights.to(dtype), schedule, first, form, **how)
        grads = local.map(lambda tensor: torch.zeros_like(tensor, dtype=torch.promote_types(dtype, torch.float32)))
        how |= {"grad": grads.map(lambda t: t[:home]), "replica_grad": grads.map(lambda t: t[home:])}
        dx, dweights = moe_mlp_backward(dout.to(dtype), x.to(dtype), h, weights.to(dtype), schedule, first, form, **how)
        assert replicas == len(last.down)
        return [out, dx, dweights, *grads.tensors()]

    first, second = (run(torch.bfloat16, kernels.build_schedule) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELIBRA_BACKEND", "reference")
        expected = run(torch.float64, reference.build_schedule)
    for a, b, c in zip(first, second, expected, strict=True):
        assert a.equal(b)
        assert_close(a, c, RELATIVE[torch.bfloat16])
