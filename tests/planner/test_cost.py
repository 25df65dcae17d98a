"""Costs against small cases done by hand, outcomes of plans, and the figures that the model must reproduce."""

import numpy as np
import pytest
from skewed_loads import skewed_loads

from relibra_kernels.planner import (
    DEVICES,
    MODELS,
    BatchPlan,
    ClusterSpec,
    DeviceSpec,
    InputError,
    ModelShape,
    Outcome,
    break_even,
    distinct_rows,
    find_device,
    find_model,
    outcome_of_plan,
    plan_batch,
    price,
    replica_bytes,
    static_plan,
)

MODEL = ModelShape(
    "tiny", layers=1, experts=4, top_k=1, hidden_size=8, intermediate_size=4, heads=1, kv_heads=1, head_dim=8
)
DEVICE = DeviceSpec("unit", grouped_flops=1e9, dense_flops=1e9, hbm=1e15, fast=1e6, slow=1e5)


def slot_load(*per_rank):
    return np.array(per_rank, np.int64)[None, None, :, None]


def test_experts_cost_whole_tiles_of_the_busiest_rank():
    flops = 3 * 2 * 3 * 8 * 4
    for rows, tiles in ((1, 1), (128, 1), (129, 2)):
        cost = price(Outcome.of(slot_load(rows, 0)), MODEL, DEVICE, gpus_per_node=2, sequence_length=1)
        assert cost.experts == pytest.approx(tiles * 128 * flops / 1e9)


def test_all_to_all_counts_known_rows_at_the_slower_network():
    rows = np.zeros((1, 1, 4, 4), np.int64)
    rows[0, 0, 0, 1] = 100  # inside the node
    rows[0, 0, 0, 0] = 1000  # stays
    rows[0, 0, 0, 2] = 7  # to the other node, ten times slower
    cost = price(Outcome.of(slot_load(1, 1, 1, 1)), MODEL, DEVICE, 2, 1, rows)
    assert cost.all_to_all == pytest.approx(4 * max(100 * 16 / 1e6, 7 * 16 / 1e5))


def test_estimated_rows_are_fewer_than_assignments():
    model = MODELS["Qwen3-30B-A3B"]
    even = price(Outcome.of(slot_load(*[8000] * 16)), model, DEVICES["8xH100"], 8, 1)
    one = price(Outcome.of(slot_load(128000, *[0] * 15)), model, DEVICES["8xH100"], 8, 1)
    rows = one.all_to_all / 4 * DEVICES["8xH100"].slow / 4096 / (8 / 16)
    assert rows == pytest.approx(128000 / 8)  # all eight choices of a token on one rank: it travels once
    assert even.all_to_all < one.all_to_all / 2


def test_replicas_hide_behind_the_dense_part():
    one = np.zeros((1, 1, 2), np.int64)
    one[0, 0, 0] = 1
    pushed = {"pushed_in": one, "pushed_out": one[..., ::-1]}
    idle = price(Outcome.of(slot_load(0, 0), **pushed), MODEL, DEVICE, 2, 1)
    weights, gradient = 2 * 96, 4 * 96
    assert idle.replicas == pytest.approx((2 * weights + gradient) / 1e6)
    assert idle.bytes_fast == 2 * weights + gradient
    kept = price(Outcome.of(slot_load(0, 0), **pushed), MODEL, DEVICE, 2, 1, keep_replicas=True)
    assert kept.replicas == pytest.approx((weights + gradient) / 1e6)
    assert kept.bytes_fast == weights + gradient
    busy = price(Outcome.of(slot_load(10000, 10000), **pushed), MODEL, DEVICE, 2, 1)
    assert busy.replicas == 0


def test_migration_and_guests_are_priced_once():
    loads = np.full((1, 2, 4), 64)
    replicas = np.full((1, 2, 2, 1), -1)
    replicas[0, :, 1, 0] = 0
    guests = np.array([[[False], [True]]])
    home, before = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 0, 1]])
    plan = BatchPlan(home, replicas, np.zeros_like(replicas), guests, gpus_per_node=1, loads=loads)
    outcome = outcome_of_plan(plan, loads, before)
    assert outcome.kept_in.tolist() == [[0, 1]]
    assert outcome.kept_out.tolist() == [[1, 0]]
    assert outcome.moved_in.tolist() == [[1, 1]]
    assert replica_bytes(outcome, MODEL) == (0.0, (6 * 96 + 2 * 14 * 96) / 2)
    cost = price(outcome, MODEL, DEVICE, 1, 1)
    assert cost.migration == pytest.approx(14 * 96 / 1e5)
    assert cost.kept > 0


def test_an_outcome_has_the_plans_loads():
    loads = skewed_loads(3, 4, 64)
    plan = plan_batch(loads, ClusterSpec(4, 4))
    outcome = outcome_of_plan(plan, loads)
    np.testing.assert_array_equal(outcome.rank_load, plan.rank_loads(loads))
    np.testing.assert_allclose(outcome.imbalance(), plan.imbalance(loads))
    near = (plan.replicas >= 0) & ~plan.kept[:, None]
    assert outcome.pushed_in.sum() == outcome.pushed_out.sum() == near.sum()
    assert outcome.kept_in.sum() == outcome.kept_out.sum() == plan.kept.sum()


def test_a_plan_without_replicas_costs_what_static_costs():
    loads = np.full((2, 3, 16), 500)
    cluster = ClusterSpec(2, 4)
    costs = [
        price(outcome_of_plan(p, loads), MODEL, DEVICE, 4, 1)
        for p in (plan_batch(loads, cluster), static_plan(loads, cluster))
    ]
    assert costs[0] == costs[1]


def test_break_even():
    model, device = MODELS["Qwen3-235B-A22B"], DEVICES["8xH100"]
    assert break_even(model, device, tokens_per_rank=8192, sequence_length=8192) == 1  # hidden behind attention
    bare = break_even(model, device, tokens_per_rank=0, sequence_length=8192)
    saved = bare * 3 * model.assignment_flops() / device.grouped_flops
    assert saved == pytest.approx((2 * model.expert_bytes + model.gradient_bytes) / device.fast, rel=0.01)


def test_distinct_rows():
    destination = np.array([[0, 0], [0, 1], [1, 1], [-1, -1], [2, -1]])
    assert distinct_rows(destination, 4).tolist() == [2, 2, 1, 0]


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"'nope'.*Qwen3-30B-A3B"):
        find_model("nope")
    with pytest.raises(InputError, match=r"'nope'.*8xH100"):
        find_device("nope")
    assert find_device("h200").name == find_device("8XH200").name == "8xH200"
    assert find_model("qwen3-235b-a22b").expert_bytes == 2 * 3 * 4096 * 1536
