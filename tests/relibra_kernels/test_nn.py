"""The modules: shapes, dispatcher, and the same results as Hugging Face's experts."""

import pytest
import torch
import torch.nn.utils.prune
from routing import random_slots
from tolerance import assert_close

import relibra_kernels
from relibra_kernels.nn import GPT_OSS, ExpertForm, ReplicatedExperts, ReplicatedMoE, TopKRouter
from relibra_kernels.planner.errors import InputError, ShapeError

E, H, I, K, T = 6, 32, 24, 2, 40  # noqa: E741


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(T, H, generator=generator),
        random_slots(T, K, E, seed=seed),
        torch.rand(T, K, generator=generator),
    )


def test_public_names():
    assert relibra_kernels.ReplicatedExperts is ReplicatedExperts
    assert relibra_kernels.ReplicatedMoE is ReplicatedMoE
    assert relibra_kernels.TopKRouter is TopKRouter


def test_experts_are_hugging_face_eager_experts():
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="needs transformers")
    config = modeling.Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=I, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    compare(ReplicatedExperts(E, H, I), modeling.Qwen3MoeExperts(config))


def test_gpt_oss_form_is_hugging_face_gpt_oss():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason="needs transformers")
    config = modeling.GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=I, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    compare(ReplicatedExperts(E, H, I, form=GPT_OSS), modeling.GptOssExperts(config), scale=1.0)


def compare(ours, theirs, scale=0.1):
    """Same state dict keys; same output and gradients."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=scale)
    theirs.load_state_dict(ours.state_dict())
    x, indices, weights = inputs()
    names, results = [name for name, _ in ours.named_parameters()], []
    for experts in (ours, theirs):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = experts(leaves[0], indices, leaves[1])
        out.square().sum().backward()
        results.append(
            [out.detach(), *(leaf.grad for leaf in leaves), *(dict(experts.named_parameters())[n].grad for n in names)]
        )
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, 1e-5)


def test_weights_are_found_where_others_put_them():
    """`prune`, as FSDP1 by default, leaves a plain attribute in a parameter's place."""
    experts = ReplicatedExperts(4, 8, 6, dtype=torch.float64)
    args = torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2, dtype=torch.float64)
    expected = experts(*args)
    torch.nn.utils.prune.identity(experts, "gate_up_proj")
    assert "gate_up_proj" not in dict(experts.named_parameters())
    torch.testing.assert_close(experts(*args), expected, rtol=0, atol=0)


def test_the_dispatcher_takes_over():
    experts = ReplicatedExperts(E, H, I)
    x, indices, weights = inputs()
    experts.dispatcher = lambda *arguments: arguments
    assert experts(x, indices, weights) == (experts, x, indices, weights)
    assert set(experts.state_dict()) == {"gate_up_proj", "down_proj"}


def test_moe_takes_sequences_and_tokens():
    torch.manual_seed(0)
    moe = ReplicatedMoE(TopKRouter(H, E, K), ReplicatedExperts(E, H, I))
    x = torch.randn(2, 5, H)
    out = moe(x)
    assert out.shape == x.shape
    assert moe(x.view(10, H)).equal(out.view(10, H))
    assert set(moe.state_dict()) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


def test_shared_experts_are_added():
    torch.manual_seed(0)
    router, experts, shared = TopKRouter(H, E, K), ReplicatedExperts(E, H, I), torch.nn.Linear(H, H)
    x = torch.randn(7, H)
    assert_close(ReplicatedMoE(router, experts, shared)(x), ReplicatedMoE(router, experts)(x) + shared(x), 1e-6)


def test_no_tokens_train():
    experts = ReplicatedExperts(E, H, I)
    x = torch.zeros(0, H, requires_grad=True)
    experts(x, torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K)).sum().backward()
    assert x.grad.shape == (0, H) and not experts.gate_up_proj.grad.any()


def test_bad_input_is_refused():
    experts = ReplicatedExperts(E, H, I)
    x, indices, weights = inputs()
    with pytest.raises(ShapeError, match="top_k_weights"):
        experts(x, indices, weights[:, :1])
    with pytest.raises(InputError, match=r"-1\.\.5"):
        experts(x, indices + E, weights)
    with pytest.raises(ShapeError, match="must be the same"):
        experts(x.bfloat16(), indices, weights)
    with pytest.raises(InputError, match="num_experts is 0"):
        ReplicatedExperts(0, H, I)
    with pytest.raises(InputError, match="activation"):
        ExpertForm(activation="gelu")
    with pytest.raises(InputError, match="limit"):
        ExpertForm(activation="clamped", limit=0)


def test_backend_can_be_forced(monkeypatch):
    x, indices, weights = inputs()
    monkeypatch.setenv("RELIBRA_BACKEND", "cuda")
    with pytest.raises(InputError, match="RELIBRA_BACKEND is 'cuda'"):
        ReplicatedExperts(E, H, I)(x, indices, weights)
    monkeypatch.setenv("RELIBRA_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=r"TRITON_INTERPRET|not installed"):
        ReplicatedExperts(E, H, I)(x, indices, weights)
