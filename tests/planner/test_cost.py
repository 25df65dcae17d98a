"""Costs against small cases done by hand, outcomes of plans, and published figures that the model must come near."""

import json
from dataclasses import replace

import numpy as np
import pytest
from skewed_loads import skewed_loads

from relibra_kernels.planner import (
    DEVICES,
    MODELS,
    BatchPlan,
    ClusterSpec,
    DeviceSpec,
    FormatError,
    InputError,
    ModelShape,
    Outcome,
    PlanOptions,
    Setting,
    find_device,
    find_model,
    outcome_of_plan,
    plan_batch,
    price,
    replica_bytes,
    static_plan,
)
from relibra_kernels.planner.pricing.transports import cheaper_transport

MODEL = ModelShape("tiny", 1, 4, 1, hidden_size=8, intermediate_size=4, heads=1, kv_heads=1, head_dim=8)
DEVICE = DeviceSpec(
    "unit", 1e9, 1e9, hbm=1e15, fast=1e6, slow=1e5, launch_fast=0.0, launch_slow=0.0, contention=0.0,
    transfer_launch=0.0, layer_seconds=0.0,
)  # fmt: skip


def setting(gpus_per_node, model=MODEL, device=DEVICE, **change):
    return Setting(model, device, gpus_per_node, 1, **change)


def slot_load(*per_rank):
    return np.array(per_rank, np.int64)[None, None, :, None]


def test_experts_cost_whole_tiles_of_the_busiest_rank():
    flops = 3 * 2 * 3 * 8 * 4
    for rows, tiles in ((1, 1), (128, 1), (129, 2)):
        cost = price(Outcome.of(slot_load(rows, 0)), setting(2))
        assert cost.experts == pytest.approx(tiles * 128 * flops / 1e9)


def test_a_slot_takes_at_least_its_weights_through_memory():
    slow = replace(DEVICE, hbm=1e3)
    cost = price(Outcome.of(slot_load(1, 0)), setting(2, device=slow))
    assert cost.experts == pytest.approx((2 * 2 * 96 + 8 * 96) / 1e3)
    assert price(Outcome.of(slot_load(0, 0)), setting(2, device=slow)).experts == 0


def test_each_expert_with_rows_takes_its_fixed_time():
    each = replace(DEVICE, slot_seconds=0.5)
    slots = np.array([[[[128, 128, 0], [1, 0, 0]]]], np.int64)
    more, less = (price(Outcome.of(slots), setting(2, device=device)).experts for device in (each, DEVICE))
    assert more - less == pytest.approx(2 * 0.5)


def test_each_of_four_exchanges_has_the_price_of_a_launch():
    costs = [
        price(Outcome.of(slot_load(1, 1, 1, 1)), setting(2, device=replace(DEVICE, launch_slow=seconds)))
        for seconds in (1.0, 3.0)
    ]
    assert costs[1].exchange - costs[0].exchange == pytest.approx(4 * 2)


def test_estimated_rows_are_fewer_than_assignments():
    where = Setting(MODELS["Qwen3-30B-A3B"], replace(DEVICES["8xH100"], launch_slow=0.0), 8)
    even = price(Outcome.of(slot_load(*[8000] * 16)), where)
    one = price(Outcome.of(slot_load(128000, *[0] * 15)), where)
    rows = one.exchange / 4 * where.device.slow / 4096 / (8 / 16)
    assert rows == pytest.approx(128000 / 8)  # all eight choices of a token on one rank: it travels once
    assert even.exchange < one.exchange / 2


def test_tokens_that_stay_on_their_node_cost_less():
    where = Setting(MODELS["Qwen3-30B-A3B"], DEVICES["8xH100"], 8)
    load = slot_load(*[8000] * 16)
    far = price(Outcome.of(load, local=load.sum(3) * 0.5), where)
    near = price(Outcome.of(load, local=load.sum(3) * 0.7), where)
    assert far.exchange == pytest.approx(price(Outcome.of(load), where).exchange)
    assert near.exchange < 0.75 * far.exchange


def test_two_hops_cross_between_nodes_once():
    where = Setting(MODELS["Qwen3-30B-A3B"], DEVICES["8xH100"], 8)
    outcome = Outcome.of(slot_load(*[64000] * 64))
    one, two = (price(outcome, replace(where, transport=way)).exchange for way in ("one", "two"))
    assert 0.5 * one < two < 0.8 * one
    assert price(outcome, replace(where, transport="auto")).exchange == two


def test_the_cheaper_transport_follows_the_cluster_and_its_networks():
    model, h100 = MODELS["Qwen3-30B-A3B"], DEVICES["8xH100"]
    assert cheaper_transport(model, h100, ClusterSpec(8, 8)) == "two"
    assert cheaper_transport(model, h100, ClusterSpec(1, 8)) == "one"
    assert cheaper_transport(model, h100, ClusterSpec(8, 1)) == "one"
    assert cheaper_transport(model, replace(h100, slow=h100.fast), ClusterSpec(8, 8)) == "one"
    assert cheaper_transport(replace(model, top_k=1), h100, ClusterSpec(8, 8)) == "one"
    assert cheaper_transport(model, h100, ClusterSpec(8, 8), tokens=8) == "one"  # launches outweigh bytes


def test_fetched_replicas_hide_behind_the_dense_part():
    one = np.zeros((1, 1, 2), np.int64)
    one[0, 0, 0] = 1
    pushed = {"pushed_in": one, "pushed_out": one[..., ::-1]}
    idle = price(Outcome.of(slot_load(0, 0), **pushed), setting(2))
    weights, gradient = 2 * 96, 4 * 96
    assert idle.fetched == pytest.approx((2 * weights + gradient) / 1e6)
    assert idle.bytes_fast == 2 * weights + gradient
    stays = price(Outcome.of(slot_load(0, 0), **pushed), setting(2, keep_replicas=True))
    assert stays.fetched == pytest.approx((weights + gradient) / 1e6)
    assert stays.bytes_fast == weights + gradient
    busy = Outcome.of(slot_load(10000, 10000), **pushed)
    assert price(busy, setting(2)).fetched == 0
    contended = replace(DEVICE, contention=0.1, transfer_launch=2.0)
    slowed = 0.1 * (2 * weights + gradient) / 1e6 + 3 * 2.0
    assert price(busy, setting(2, device=contended)).fetched == pytest.approx(slowed)


def test_migration_and_kept_replicas_are_priced_once():
    loads = np.full((1, 2, 4), 64)
    replicas = np.full((1, 2, 2, 1), -1)
    replicas[0, :, 1, 0] = 0
    kept = np.array([[[False], [True]]])
    home, before = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 0, 1]])
    plan = BatchPlan(home, replicas, np.zeros_like(replicas), kept, gpus_per_node=1, loads=loads)
    outcome = outcome_of_plan(plan, loads, before)
    assert outcome.kept_in.tolist() == [[0, 1]]
    assert outcome.kept_out.tolist() == [[1, 0]]
    assert outcome.moved_in.tolist() == [[1, 1]]
    assert replica_bytes(outcome, MODEL) == (0.0, (6 * 96 + 2 * 14 * 96) / 2)
    cost = price(outcome, setting(1))
    assert cost.migration == pytest.approx(14 * 96 / 1e5)
    assert cost.kept > 0
    near = BatchPlan(home, replicas, np.zeros_like(replicas), kept, gpus_per_node=2, loads=loads)
    assert replica_bytes(outcome_of_plan(near, loads), MODEL) == (6 * 96 / 2, 0.0)
    inside = price(outcome_of_plan(near, loads, before), setting(2)).migration  # one node has no slower network
    assert inside == pytest.approx(14 * 96 / setting(2).device.fast) != cost.migration


def test_an_outcome_has_the_plans_loads():
    loads = skewed_loads(3, 4, 64)
    plan = plan_batch(loads, ClusterSpec(4, 4), options=PlanOptions(kept_bytes=2 * 28_311_552, balance=1.0))
    outcome = outcome_of_plan(plan, loads)
    np.testing.assert_array_equal(outcome.rank_load, plan.rank_loads(loads))
    np.testing.assert_allclose(outcome.imbalance(), plan.imbalance(loads))
    near = (plan.replicas >= 0) & ~plan.kept[:, None]
    assert outcome.pushed_in.sum() == outcome.pushed_out.sum() == near.sum() > 0
    crossings = outcome.kept_in.sum() + outcome.kept_near_in.sum()
    assert crossings == outcome.kept_out.sum() + outcome.kept_near_out.sum() == plan.kept.sum() > 0
    assert (outcome.local <= outcome.rank_load + 1e-6).all()


def test_local_assignments_by_hand():
    """Expert 0 has its home on node 0 and a kept replica on node 1. Both nodes' tokens want it alike."""
    replicas, kept = np.array([[[[-1], [0]]]]), np.array([[[False], [True]]])
    for quota, local in ((50, (50 + 20, 50 + 40)), (10, (50 + 20, 10 + 40)), (80, (20 + 20, 50 + 40))):
        loads = np.array([[[100, 40, 40, 40]]])
        plan = BatchPlan(np.array([[0, 0, 1, 1]]), replicas, np.array([[[[0], [quota]]]]), kept, 1, loads=loads)
        assert outcome_of_plan(plan, loads).local[0, 0].tolist() == [local[0], local[1]]
    by_source = np.array([[[[90, 0, 0, 0], [10, 40, 40, 40]]]])
    plan = BatchPlan(np.array([[0, 0, 1, 1]]), replicas, np.array([[[[0], [30]]]]), kept, 1, loads=by_source)
    assert outcome_of_plan(plan, by_source).local[0, 0].tolist() == [70, 10 + 80]


def test_a_plan_without_replicas_costs_what_static_costs():
    loads = np.full((2, 3, 16), 500)
    cluster = ClusterSpec(2, 4)
    plans = plan_batch(loads, cluster), static_plan(loads, cluster)
    costs = [price(outcome_of_plan(plan, loads), setting(4)) for plan in plans]
    assert costs[0] == costs[1]


def test_names_and_shapes(tmp_path):
    with pytest.raises(InputError, match=r"'nope'.*Qwen3-30B-A3B"):
        find_model("nope")
    with pytest.raises(InputError, match=r"'nope'.*8xH100"):
        find_device("nope")
    with pytest.raises(InputError, match="four integers"):
        find_model("2048,768,128")
    assert find_device("h200").name == find_device("8XH200").name == "8xH200"
    assert find_model("qwen3-235b-a22b").expert_bytes == 2 * 3 * 4096 * 1536
    numbers = find_model("2048,768,64,4")
    assert (numbers.hidden_size, numbers.intermediate_size, numbers.experts, numbers.top_k) == (2048, 768, 64, 4)
    assert (numbers.heads, numbers.kv_heads, numbers.head_dim) == (16, 2, 128)

    config = tmp_path / "config.json"
    config.write_text(
        '{"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128, '
        '"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, '
        '"head_dim": 128}'
    )
    assert replace(find_model(str(config)), name="Qwen3-30B-A3B") == MODELS["Qwen3-30B-A3B"]
    config.write_text('{"hidden_size": 2048, "num_attention_heads": 8}')
    with pytest.raises(FormatError, match="moe_intermediate_size"):
        find_model(str(config))
    config.write_text("[1]")
    with pytest.raises(FormatError, match="not the object"):
        find_model(str(config))
    with pytest.raises(FormatError, match=r"gone\.json: cannot be read"):
        find_model(str(tmp_path / "gone.json"))


def test_a_config_of_nemotron_h(tmp_path):
    """Half of the blocks are MoE, experts have no gate, and the shared one has a size of its own."""
    config = {
        "hidden_size": 2688, "moe_intermediate_size": 1856, "intermediate_size": 1856, "n_routed_experts": 128,
        "num_experts_per_tok": 6, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
        "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 3712, "mlp_hidden_act": "relu2",
    }  # fmt: skip
    path = tmp_path / "config.json"
    for blocks in (
        {"layers_block_type": ["mamba", "moe", "attention", "moe"]},  # as transformers writes it, without a number
        {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4},
    ):
        path.write_text(json.dumps(config | blocks))
        shape = find_model(str(path))
        assert (shape.layers, shape.shared_intermediate_size, shape.has_gate) == (2, 3712, False)
        assert shape.expert_bytes == 2 * 2 * 2688 * 1856
        attention = 2688 * 32 * 128 + 2 * 2688 * 2 * 128 + 32 * 128 * 2688
        assert shape.dense_flops(0) == 2 * (attention + 2 * 2688 * 3712)
    path.write_text(json.dumps(config | {"moe_latent_size": 1024, "num_hidden_layers": 4}))
    with pytest.raises(FormatError, match="moe_latent_size is 1024; experts of another width"):
        find_model(str(path))


def test_latent_attention_of_deepseek():
    """The attention of DeepSeek-V3 has 187.1 million parameters a layer, its shared expert 44.0 million."""
    shape = MODELS["DeepSeek-V3"]
    attention = shape.dense_flops(0) / 2 - 3 * 7168 * 2048
    assert attention == pytest.approx(187.1e6, rel=1e-3)
