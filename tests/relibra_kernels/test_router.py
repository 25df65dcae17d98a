"""The router against Hugging Face's, live and replayed."""

import pytest
import torch
from tolerance import assert_close

from relibra_kernels.nn import TopKRouter, record_routing, replay_routing
from relibra_kernels.planner.errors import InputError, ShapeError

H, E, K, T = 32, 16, 4, 50


def make(scoring="softmax", seed=0, **options):
    torch.manual_seed(seed)
    router = TopKRouter(H, E, K, scoring=scoring, **options)
    with torch.no_grad():
        router.weight.normal_()
        if scoring == "sigmoid":
            router.e_score_correction_bias.normal_(std=0.1)
    return router, torch.randn(T, H, requires_grad=True)


def by_expert(weights, indices):
    """Weights as `[T, E]`, so that the order of a token's experts does not matter."""
    return torch.zeros(len(weights), E, dtype=weights.dtype).scatter(1, indices, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_is_qwen3_moe(normalize, dtype):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="needs transformers")
    config = modeling.Qwen3MoeConfig(hidden_size=H, num_experts=E, num_experts_per_tok=K, norm_topk_prob=normalize)
    theirs = modeling.Qwen3MoeTopKRouter(config).to(dtype)
    ours, x = make(normalize=normalize)
    ours, x = ours.to(dtype), x.detach().to(dtype)
    theirs.load_state_dict(ours.state_dict())
    for got, expected in zip(ours(x), theirs(x), strict=True):
        assert got.dtype == expected.dtype
        assert_close(got, expected, 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_sigmoid_is_deepseek_v3(groups):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3", reason="needs transformers")
    config = modeling.DeepseekV3Config(
        hidden_size=H,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=groups[0],
        topk_group=groups[1],
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    theirs = modeling.DeepseekV3TopkRouter(config)
    ours, x = make("sigmoid", num_groups=groups[0], groups_per_token=groups[1], routed_scaling_factor=2.5)
    theirs.load_state_dict(ours.state_dict())
    logits, weights, indices = ours(x)
    expected_logits, expected_weights, expected_indices = theirs(x)
    assert_close(logits, expected_logits, 1e-6)
    assert_close(by_expert(weights, indices), by_expert(expected_weights, expected_indices), 1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_replay_of_its_own_choice_changes_nothing(scoring):
    router, x = make(scoring)
    logits, weights, indices = router(x)
    (expected,) = torch.autograd.grad(weights.square().sum(), router.weight)
    router.recorded = indices.to(torch.int16)
    replayed_logits, replayed_weights, replayed_indices = router(x)
    assert replayed_indices.equal(indices) and replayed_weights.equal(weights) and replayed_logits.equal(logits)
    (got,) = torch.autograd.grad(replayed_weights.square().sum(), router.weight)
    assert got.equal(expected) and got.any()


def test_replay_of_other_choices():
    router, x = make()
    recorded = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    router.recorded = recorded
    logits, weights, indices = router(x)
    assert indices.equal(recorded)
    scores = logits.double().softmax(-1).gather(1, recorded)
    assert_close(weights, scores / scores.sum(1, keepdim=True), 1e-6)
    weights.square().sum().backward()
    assert router.weight.grad.any() and x.grad.any()


def test_unknown_rows_are_routed_live():
    router, x = make()
    live = router(x)[2]
    recorded = (live + 1) % E
    recorded[::3] = -1
    router.recorded = recorded
    indices = router(x)[2]
    assert indices[::3].equal(live[::3])
    assert indices[1::3].equal(recorded[1::3]) and indices[2::3].equal(recorded[2::3])
    router.recorded = None
    assert router(x)[2].equal(live)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1, 2, E], "must lie in -1..15"),
        ([0, 1, 2, -2], "must lie in -1..15"),
        ([0, 0, 0, 0], "row 7 names an expert twice"),
        ([3, 1, 2, 3], "row 7 names an expert twice"),
        ([3, 1, 2, -1], "row 7 is recorded in part"),
    ],
)
def test_recorded_rows_that_no_router_gives_are_refused(row, message):
    router, _ = make()
    recorded = torch.arange(K).repeat(T, 1)
    recorded[7] = torch.tensor(row)
    with pytest.raises(InputError, match=message):
        router.recorded = recorded
    assert router.recorded is None


def test_recorded_of_another_shape_is_refused():
    router, x = make()
    with pytest.raises(ShapeError, match=r"integers \[T, 4\]"):
        router.recorded = torch.zeros(T, K + 1, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"integers \[T, 4\]"):
        router.recorded = torch.zeros(T, K)
    router.recorded = torch.arange(K).repeat(T - 1, 1)
    with pytest.raises(ShapeError, match="recorded has 49 rows and the input 50 tokens"):
        router(x)


def test_record_and_replay_of_several_layers():
    routers, inputs = zip(*(make(seed=layer) for layer in range(3)), strict=True)
    with record_routing(routers) as recorded:
        expected = [[router(x)[2] for _ in range(2)] for router, x in zip(routers, inputs, strict=True)]
    assert [len(calls) for calls in recorded] == [2, 2, 2]
    assert all(a.equal(b) for got, want in zip(recorded, expected, strict=True) for a, b in zip(got, want, strict=True))

    shifted = torch.stack([(calls[0] + 1) % E for calls in recorded], dim=1)
    with replay_routing(routers, shifted):
        assert all(router(x)[2].equal(shifted[:, i]) for i, (router, x) in enumerate(zip(routers, inputs, strict=True)))
    assert all(router(x)[2].equal(calls[0]) for router, x, calls in zip(routers, inputs, expected, strict=True))
    assert all(len(calls) == 2 for calls in recorded)
    with pytest.raises(ShapeError, match=r"\[T, 3 layers, K\]"), replay_routing(routers, shifted[:, :2]):
        pass


def test_a_bad_layer_leaves_every_router_as_it_was():
    routers = [make(seed=layer)[0] for layer in range(2)]
    indices = torch.arange(K).repeat(T, 2, 1)
    indices[3, 1] = 0
    with pytest.raises(InputError, match="row 3"), replay_routing(routers, indices):
        pass
    assert routers[0].recorded is None


@pytest.mark.parametrize("options", [{"num_groups": 3}, {"num_groups": 4, "groups_per_token": 5}, {"scoring": "relu"}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError):
        TopKRouter(H, E, K, **options)
    with pytest.raises(InputError, match="top_k is 17"):
        TopKRouter(H, E, E + 1)
