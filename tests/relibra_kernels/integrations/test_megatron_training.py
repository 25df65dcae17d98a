"""A GPT of megatron-core whose MoE layers are ours: over two ranks under plans as on one, and its checkpoints."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("megatron") is None and os.environ.get("RELIBRA_MEGATRON") != "required":
    pytest.skip("megatron-core is not installed", allow_module_level=True)

import megatron_pipeline
import megatron_shares_training
import torch
from megatron_ranks import exported, loaded, resume, save, train
from ranks import RankError, Ranks
from tolerance import assert_close


@pytest.fixture(scope="module")
def ranks():
    groups: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        if size not in groups:
            groups[size] = Ranks(size, daemon=False)
        return groups[size]

    yield of_size
    for group in groups.values():
        group.close()


NO_AUX = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}  # it depends on who has which tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"moe_shared_expert_intermediate_size": 16, "moe_router_score_function": "sigmoid"},
    ],
    ids=["plain", "recomputed", "shared expert"],
)
def test_two_ranks_under_plans_train_as_one(ranks, options):
    expected, got = (ranks(size).run(train, 3, {**NO_AUX, **options})[0] for size in (1, 2))
    assert got["moved"] and got["copies"]
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert len(set(got["losses"])) == 3
    assert got["agreeing_share"] == expected["agreeing_share"] < 0.5  # drawn at random, and compared on either
    for kind in ("gradients", "parameters"):
        assert got[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            assert_close(got[kind][name], tensor, 1e-5, f"{kind} of {name}")


@pytest.mark.parametrize(
    ("size", "distributed"), [(2, True), (4, False), (4, True)], ids=["sharded state", "two copies", "both"]
)
def test_copies_of_the_experts_and_sharded_optimizer_state(ranks, size, distributed):
    """Experts are spread over two ranks; the state of the distributed optimizer moves with them, from all copies."""
    expected = ranks(1).run(train, 3, {**NO_AUX, "distributed": distributed})[0]
    for got in ranks(size).run(train, 3, {**NO_AUX, "distributed": distributed}):
        assert got["moved"] and got["copies"]
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, tensor in expected["parameters"].items():
            assert_close(got["parameters"][name], tensor, 1e-5, name)


RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"context": 2, "expert": 2}, {}),
        ({"tensor": 2, "expert": 2}, {"moe_shared_expert_intermediate_size": 16}),
        ({"context": 2, "tensor": 2, "expert": 4}, RECOMPUTED),
        ({"context": 2, "expert": 2, "data": 2}, {"distributed": True}),
    ],
    ids=["context", "sequence", "context and sequence, recomputed", "context and copies"],
)
def test_ranks_that_share_sequences_train_as_one(ranks, sizes, options):
    """Context parallelism, and tensor with sequence parallelism: every rank plans and replays its own tokens."""
    size = sizes.get("context", 1) * sizes.get("tensor", 1) * sizes.get("data", 1)
    options = {**NO_AUX, **options}
    expected = ranks(1).run(megatron_shares_training.train, {}, 3, options)[0]
    for got in ranks(size).run(megatron_shares_training.train, sizes, 3, options):
        assert got["moved"] and got["copies"]
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert bool(got["cut"]) == ("tensor" in sizes)
        for kind in ("gradients", "parameters"):
            if kind == "gradients" and "distributed" in options:
                continue  # each rank has reduced its shard only
            assert got[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                if name in got["cut"]:
                    tensor = megatron_shares_training.part_of(
                        tensor, got["cut"][name], got["tensor_rank"], sizes["tensor"]
                    )
                assert_close(got[kind][name], tensor, 1e-5, f"{kind} of {name}")


@pytest.mark.parametrize(("chunks", "layers"), [(1, [(0, 1), (2, 3)]), (2, [(0, 2), (1, 3)])], ids=["1F1B", "virtual"])
def test_pipeline_stages_train_as_one(ranks, chunks, layers):
    """Two stages of two ranks each, by Megatron's schedules: every stage plans its own layers."""
    first, losses, parameters = ranks(1).run(megatron_pipeline.alone)[0]
    got = ranks(4).run(megatron_pipeline.together, first, chunks)
    assert [of_rank[2] for of_rank in got] == [layers[0]] * 2 + [layers[1]] * 2
    assert got[2][0] == got[3][0] == pytest.approx(losses, rel=1e-5)
    assert got[0][1].keys() | got[2][1].keys() == parameters.keys()
    for of_stage in (got[0][1], got[2][1]):
        for name, tensor in of_stage.items():
            assert_close(tensor, parameters[name], 1e-5, name)


def test_the_routers_losses_stay(ranks):
    plain, with_loss = (ranks(1).run(train, 1, options)[0]["gradients"] for options in (NO_AUX, {}))
    changed = {name for name, gradient in plain.items() if not gradient.equal(with_loss[name])}
    assert any(name.endswith("router.weight") for name in changed)


def test_weights_are_exported_by_the_names_of_megatrons_grouped_experts(ranks):
    """By logical numbers, whatever rank has them."""
    expected, own = ranks(1).run(exported, 2, NO_AUX)[0]
    for number in range(8):
        for name, shape in (("linear_fc1", (48, 32)), ("linear_fc2", (32, 24))):
            assert expected[f"decoder.layers.1.mlp.experts.{name}.weight{number}"].shape == shape
        assert expected[f"decoder.layers.1.mlp.experts.linear_fc2.weight{number}"].equal(own[number])
    assert "decoder.layers.0.mlp.router.weight" in expected and not any("proj" in n.split(".")[-1] for n in expected)
    for of_rank, _ in ranks(2).run(exported, 2, NO_AUX):
        assert of_rank.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(of_rank[name], tensor, 1e-5, name)


def test_experts_are_loaded_by_name_where_they_are(ranks):
    shapes = {"linear_fc1": (48, 32), "linear_fc2": (32, 24)}
    weights = {
        f"decoder.layers.{layer}.mlp.experts.{name}.weight{expert}": torch.randn(shape)
        for layer in range(2)
        for name, shape in shapes.items()
        for expert in range(8)
    }
    for got in ranks(2).run(loaded, weights, NO_AUX):
        assert got.keys() == weights.keys()
        assert all(got[name].equal(weight) for name, weight in weights.items())
    with pytest.raises(RankError, match=r"linear_fc1.weight0 is \(32, 48\); it must be \(48, 32\)"):
        ranks(1).run(loaded, {name: weight.T for name, weight in weights.items()}, NO_AUX)


def test_a_checkpoint_knows_neither_plan_nor_number_of_ranks(ranks, tmp_path):
    following = ranks(2).run(save, str(tmp_path / "two"), 3, {})[0]
    assert ranks(2).run(resume, str(tmp_path / "two"), 3, {})[0] == following
    assert ranks(1).run(resume, str(tmp_path / "two"), 3, {}, True)[0] == pytest.approx(following, rel=1e-5)


@pytest.mark.parametrize(("format_", "before"), [("fully_reshardable", ""), ("dp_reshardable", "move_home")])
def test_a_checkpoint_of_the_distributed_optimizer(ranks, tmp_path, format_, before):
    options = {**NO_AUX, "distributed": True, "sharding": format_}
    following = ranks(2).run(save, str(tmp_path / "two"), 3, options, before)[0]
    assert ranks(2).run(resume, str(tmp_path / "two"), 3, options)[0] == pytest.approx(following, rel=1e-6)


def test_a_checkpoint_that_would_mix_experts_up_is_refused(ranks, tmp_path):
    options = {**NO_AUX, "distributed": True, "sharding": "dp_reshardable"}
    with pytest.raises(RankError, match=r"dp_reshardable.*saves the optimizer.*state by rank, but experts have moved"):
        ranks(2).run(save, str(tmp_path / "two"), 1, options)
