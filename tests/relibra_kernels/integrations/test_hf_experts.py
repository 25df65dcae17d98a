"""`set_experts_implementation("relibra")` in eight families: the eager model's logits and gradients, and back again."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from hf_families import FAMILIES, experts_modules, logits_and_gradients, make_model, make_tokens
from tolerance import assert_close
from torch.nn import functional
from transformers.integrations.moe import use_experts_implementation
from versions import TORCH, TRANSFORMERS

from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.integrations.transformers import expert_form, experts_forward, replace_moe_blocks
from relibra_kernels.planner.errors import InputError


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_eager(family):
    model, tokens = make_model(family), make_tokens()
    expected_logits, expected = logits_and_gradients(model, tokens)
    model.set_experts_implementation("relibra")
    calls = []
    for module in experts_modules(model):
        module.register_forward_hook(lambda *_: calls.append(1))
    logits, gradients = logits_and_gradients(model, tokens)
    assert len(calls) == len(FAMILIES[family][2])
    assert all("_relibra_flags" in module.__dict__ for module in experts_modules(model))  # ours did run
    assert (logits - expected_logits).abs().max() <= 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 1e-5, name)

    model.set_experts_implementation("eager")
    logits, gradients = logits_and_gradients(model, tokens)
    assert logits.equal(expected_logits)
    assert all(gradients[name].equal(gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_under_torch_compile(family):
    tokens = make_tokens(2, 7)
    model = make_model(family, num_hidden_layers=1, first_k_dense_replace=0, mlp_only_layers=[])
    assert len(experts_modules(model)) == 1
    expected_logits, expected = logits_and_gradients(model, tokens)
    model.set_experts_implementation("relibra")
    if TORCH < (2, 12):  # its compiler takes no module as an argument of what it assumes constant
        model(tokens, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, gradients = logits_and_gradients(compiled, tokens)
    assert (logits - expected_logits).abs().max() <= 1e-5
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name.removeprefix("_orig_mod.")], 1e-5, name)
    assert len(gradients) == len(expected)


class Logits(torch.nn.Module):
    """What torch.export takes: one tensor in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


@pytest.mark.parametrize("take_over", [False, True])
def test_exported_without_a_forward_before(take_over):
    tokens, model = make_tokens(2, 7), make_model("gpt_oss").eval()
    expected, layers = model(tokens, use_cache=False).logits, len(experts_modules(model))
    if take_over:
        replace_moe_blocks(model)
    else:
        model.set_experts_implementation("relibra")
    if TORCH < (2, 12) and not take_over:  # as in test_compiled_without_a_forward_before
        with pytest.raises(InputError, match="run the model once before it is compiled"):
            torch.export.export(Logits(model), (tokens,), strict=False)
        return
    exported = torch.export.export(Logits(model), (tokens,), strict=False)
    assert sum("moe_mlp" in str(node.target) for node in exported.graph.nodes) == layers
    assert (exported.module()(tokens) - expected).abs().max() <= 1e-5


def test_experts_without_memory_have_shapes():
    model = make_model("qwen3_moe")
    model.set_experts_implementation("relibra")
    experts = experts_modules(model.to("meta"))[0]
    x = torch.empty(5, 32, device="meta", requires_grad=True)
    out = experts(x, torch.empty(5, 2, dtype=torch.int64, device="meta"), torch.empty(5, 2, device="meta"))
    out.sum().backward()
    assert out.is_meta and out.shape == x.grad.shape == x.shape
    assert experts.down_proj.grad.shape == experts.down_proj.shape


def test_forms_are_recognised():
    assert expert_form(experts_modules(make_model("qwen3_moe"))[0]) == ExpertForm()
    assert expert_form(experts_modules(make_model("gpt_oss"))[0]) == GPT_OSS
    if TRANSFORMERS < (5, 23):  # its gpt-oss has no other form
        return
    other = experts_modules(make_model("gpt_oss", swiglu_limit=2.5, swiglu_alpha=1.5))[0]
    assert (expert_form(other).limit, expert_form(other).alpha) == (2.5, 1.5)


def test_activations_are_recognised():
    """By what they compute: under the flags that there are, and with the limits that the module has."""
    found = [
        expert_form(experts_like({}, torch.nn.GELU, approximate="tanh")),
        expert_form(gated_like(lambda gate, up: functional.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5))),
        expert_form(gated_like(lambda gate, up: functional.silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5))),
    ]
    assert [form.activation for form in found] == ["gelu_tanh", "clamped_silu", "capped_silu"]
    assert [form.limit for form in found[1:]] == [0.5, 0.5]


def gated_like(gate):
    experts = experts_like({})
    experts.limit, experts._apply_gate = 0.5, lambda h: gate(*h.chunk(2, -1))
    return experts


def experts_like(flags: dict, act=torch.nn.SiLU, **how):
    @use_experts_implementation(**flags)
    class OddExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = 4, act(**how)
            self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 16, 8))
            self.down_proj = torch.nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, *_):
            raise AssertionError("the eager forward ran")

    return OddExperts(type("Config", (), {"_experts_implementation": "relibra"})())


@pytest.mark.parametrize(
    ("flags", "act", "message"),
    [
        ({"has_gate": False}, torch.nn.SiLU, r"the activation without a gate of OddExperts \(act_fn SiLU\)"),
        ({}, torch.nn.GELU, r"_apply_gate of OddExperts \(act_fn GELU\)"),
        ({"is_concatenated": False}, torch.nn.SiLU, "is_concatenated=False"),  # the default gate is concatenated
    ],
)
def test_what_is_not_supported_is_named(flags, act, message):
    experts = experts_like(flags, act)
    with pytest.raises(InputError, match=message):
        experts(torch.randn(3, 8), torch.tensor([[0, 1]] * 3), torch.ones(3, 2))


def test_choices_of_other_ranks_are_dropped():
    experts = experts_like({})
    x, weights = torch.randn(3, 8), torch.rand(3, 2, requires_grad=True)
    expected = experts(x, torch.tensor([[0, -1], [-1, -1], [3, 2]]), weights)
    experts._is_expert_parallel = True
    out = experts(x, torch.tensor([[0, 4], [4, 4], [3, 2]]), weights)
    assert out.equal(expected) and not out[1].any()
    out.sum().backward()
    assert not weights.grad[1].any() and weights.grad[2].all()


def test_autocast_and_mixed_dtypes():
    experts = experts_like({})
    index, weights = torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    x = torch.randn(3, 8)
    expected = experts(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, index, weights)
    assert out.dtype == torch.float32 and not out.equal(expected)
    assert_close(out, expected, 1.5e-2)
    out.sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32 and experts.down_proj.grad.any()
    experts.to(torch.bfloat16)
    assert experts(x, index, weights).dtype == torch.float32


def test_nothing_of_the_framework_is_replaced():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    assert ALL_EXPERTS_FUNCTIONS["relibra"] is experts_forward
    for name in ("Qwen3MoeExperts", "Qwen3MoeTopKRouter", "Qwen3MoeSparseMoeBlock"):
        assert getattr(modeling_qwen3_moe, name).__module__ == modeling_qwen3_moe.__name__
        assert "relibra" not in getattr(modeling_qwen3_moe, name).forward.__module__


def test_a_version_without_a_hook_for_expert_parallelism_is_refused_by_name(monkeypatch):
    """transformers before 5.23: all else works there."""
    from relibra_kernels.integrations.transformers import communication, expert_parallel

    monkeypatch.setattr(expert_parallel, "EPImplementationInterface", None)
    with pytest.raises(InputError, match=r"transformers is 5\..* needs 5\.23 or newer"):
        communication(make_model("qwen3_moe"))


def test_the_compiler_of_torch_2_11_is_told_what_to_do(monkeypatch):
    from relibra_kernels.integrations.transformers import experts as module

    monkeypatch.setattr(module, "_COMPILES_AFTER_A_FORWARD", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(InputError, match="run the model once before it is compiled"):
        module._flags(experts_modules(make_model("qwen3_moe"))[0])
