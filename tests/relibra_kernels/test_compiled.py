"""The layer under torch.compile: one graph, the same results."""

import pytest
import torch
from tolerance import assert_close

from relibra_kernels.compiled import moe_mlp_functional
from relibra_kernels.nn import GPT_OSS, ExpertForm, ReplicatedExperts, ReplicatedMoE, TopKRouter

H, I, E, K = 32, 24, 6, 2  # noqa: E741


def make(form=None, recompute=False):
    torch.manual_seed(0)
    moe = ReplicatedMoE(TopKRouter(H, E, K), ReplicatedExperts(E, H, I, form=form, recompute=recompute))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.3)
    return moe


def run(function, moe, tokens=(3, 7)):
    x = torch.randn(*tokens, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = function(x)
    out.square().sum().backward()
    gradients = [x.grad, *(parameter.grad.clone() for parameter in moe.parameters())]
    moe.zero_grad()
    return [out.detach(), *gradients]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", [ExpertForm(), GPT_OSS], ids=["qwen", "gpt-oss"])
def test_one_graph_and_the_same_results(form, recompute):
    moe = make(form, recompute)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, moe), run(moe, moe), strict=True):
        assert_close(got, expected, 1e-6)


def test_another_token_count_needs_no_new_graph_after_the_second():
    moe = make()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        run(compiled, moe, (tokens,))
    with torch.compiler.set_stance("fail_on_recompile"):
        for got, expected in zip(run(compiled, moe, (13,)), run(moe, moe, (13,)), strict=True):
            assert_close(got, expected, 1e-6)


def test_the_ops_keep_their_contract():
    """Schema, fake kernels and autograd registration, as torch checks them."""
    moe = make()
    x = torch.randn(7, H, requires_grad=True)
    _, weights, indices = moe.gate(x)
    experts = moe.experts
    flags = (False, True, "silu", 7.0, 1.702, False)
    arguments = (x, weights.detach().requires_grad_(), indices, *experts.weights[:4], *flags)
    torch.library.opcheck(torch.ops.relibra.moe_mlp.default, arguments)
    assert moe_mlp_functional(x, weights, indices, experts.weights, experts.form).shape == x.shape
