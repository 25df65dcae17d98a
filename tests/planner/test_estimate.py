"""What a batch will take, by hand, and against the prices and counts that it is made of."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from skewed_loads import skewed_loads

from relibra_kernels.planner import (
    BatchPlan,
    ClusterSpec,
    ModelShape,
    PlanOptions,
    ShapeError,
    estimate_plan,
    find_model,
    outcome_of_plan,
    plan_batch,
    price,
    replica_bytes,
    static_plan,
)

TINY = ModelShape("tiny", 1, 4, 1, hidden_size=8, intermediate_size=4, heads=1, kv_heads=1, head_dim=8)
WEIGHTS, GRADIENT = 2 * 96, 4 * 96  # bytes of an expert of TINY, 3 * 8 * 4 parameters


def test_bytes_and_memory_by_hand():
    """Four ranks on two nodes: rank 1 fetches expert 0 of its node twice, rank 2 keeps it for both micro-batches."""
    loads = np.array([[[12, 4, 4, 4], [12, 4, 4, 4]]])
    replicas = np.full((1, 2, 4, 2), -1, np.int32)
    quota, kept = np.zeros_like(replicas), np.zeros((1, 4, 2), bool)
    replicas[:, :, 1, 0] = replicas[:, :, 2, 1] = 0
    quota[:, :, 1, 0] = quota[:, :, 2, 1] = 4
    kept[0, 2, 1] = True
    plan = BatchPlan(np.arange(4, dtype=np.int32)[None], replicas, quota, kept, 2, loads=loads)
    before = np.array([[0, 1, 3, 2]])  # two experts change their home

    setting = PlanOptions(shape=TINY).setting(4, 2)
    found = estimate_plan(plan, loads, setting, before)
    assert found.fetched_fast_bytes == 2 * (2 * WEIGHTS + GRADIENT)
    assert (found.kept_fast_bytes, found.kept_slow_bytes) == (0, WEIGHTS + GRADIENT)
    assert found.migration_bytes == 2 * 14 * 96
    assert found.replica_fast_bytes == found.fetched_fast_bytes
    assert found.replica_slow_bytes == WEIGHTS + GRADIENT + 14 * 96  # rank 2 gets a copy and a moved expert
    assert (found.home_weights_bytes, found.gradient_bytes) == (WEIGHTS, GRADIENT)
    assert found.kept_bytes == WEIGHTS + GRADIENT
    assert found.fetched_bytes == 2 * WEIGHTS + GRADIENT
    assert (found.static_max_mean, found.planned_max_mean) == (2.0, pytest.approx(8 / 6))
    parts = (found.home_weights_bytes, found.gradient_bytes, found.kept_bytes, found.fetched_bytes)
    assert found.memory_bytes == sum(parts) + found.token_buffer_bytes + found.activation_bytes
    assert min(asdict(found)[name] for name in ("token_buffer_bytes", "activation_bytes", "token_slow_bytes")) > 0

    staying = estimate_plan(plan, loads, replace(setting, keep_replicas=True))
    assert staying.fetched_fast_bytes == 2 * (WEIGHTS + GRADIENT)
    assert staying.fetched_bytes == WEIGHTS + GRADIENT  # one layer
    assert staying.migration_bytes == 0


def test_adapters_have_small_gradients_and_frozen_weights_none():
    """Rank 2 beside gate and up [8, 8] and down [8, 4]: 56 elements are trained, sent back and have optimizer state."""
    adapted = replace(TINY, adapter_rank=2)
    factors = 2 * (8 + 8) + 2 * (4 + 8)
    assert (adapted.trained_parameters, TINY.trained_parameters) == (factors, 96)
    assert adapted.expert_bytes == WEIGHTS + 2 * factors
    assert adapted.gradient_bytes == 4 * factors < GRADIENT
    assert adapted.migration_bytes == adapted.expert_bytes + 12 * factors
    assert adapted.step_flops() == 2 * 2 * (96 + factors) + 2 * factors
    qwen = find_model("Qwen3-30B-A3B")
    assert replace(qwen, adapter_rank=16).step_flops() < qwen.step_flops() == 6 * qwen.expert_parameters
    loads = np.array([[[12, 4, 4, 4], [12, 4, 4, 4]]])
    plan = plan_batch(loads, ClusterSpec(1, 4, 1), options=PlanOptions(balance=1.0, shape=TINY))
    whole, small = (estimate_plan(plan, loads, PlanOptions(shape=s).setting(4, 4)) for s in (TINY, adapted))
    assert small.gradient_bytes == 4 * factors and whole.gradient_bytes == GRADIENT
    copies = whole.fetched_fast_bytes + whole.kept_fast_bytes
    assert 0 < small.fetched_fast_bytes + small.kept_fast_bytes < copies


def test_parameters_in_fp32_take_more_and_need_no_master_weights():
    wide = replace(TINY, parameter_bytes=4)
    assert (wide.expert_bytes, wide.gradient_bytes, wide.copy_bytes) == (4 * 96, 4 * 96, 8 * 96)
    assert (wide.migration_bytes, TINY.migration_bytes) == (12 * 96, 14 * 96)
    double = replace(TINY, parameter_bytes=8)
    assert (double.gradient_bytes, double.copy_bytes, double.migration_bytes) == (8 * 96, 16 * 96, 24 * 96)
    memory = 10 * TINY.copy_bytes
    assert [PlanOptions(shape=s, kept_bytes=memory).kept_copies for s in (TINY, wide)] == [10, 7]


def test_memory_of_one_rank_by_hand():
    """24 tokens of 8 elements, one expert each: six buffers of rows; rows, and gate and up of 4, stay for backward."""
    loads = np.array([[[12, 4, 4, 4]]])
    found = estimate_plan(static_plan(loads, ClusterSpec(1, 1)), loads, PlanOptions(shape=TINY).setting(4, 1))
    assert found.token_buffer_bytes == 6 * 24 * 8 * 2
    assert found.activation_bytes == 24 * 8 * 2 + 24 * 2 * 4 * 2
    assert (found.token_fast_bytes, found.token_slow_bytes, found.planned_max_mean) == (0, 0, 1.0)
    ungated = replace(TINY, has_gate=False)
    found = estimate_plan(static_plan(loads, ClusterSpec(1, 1)), loads, PlanOptions(shape=ungated).setting(4, 1))
    assert found.activation_bytes == 24 * 8 * 2 + 24 * 4 * 2


@pytest.mark.parametrize("transport", ["one", "two", "auto"])
def test_seconds_and_bytes_are_those_of_the_price(transport):
    loads, cluster = skewed_loads(layers=2, micro_batches=3, experts=32), ClusterSpec(2, 4, 2)
    options = PlanOptions(shape=find_model("Qwen3-30B-A3B"), transport=transport)
    plan = plan_batch(loads, cluster, options=options)
    setting = options.setting(32, 4)
    found, cost = estimate_plan(plan, loads, setting), price(outcome_of_plan(plan, loads), setting)
    assert found.planned_seconds == cost.seconds
    assert found.static_seconds == price(outcome_of_plan(static_plan(loads, cluster), loads), setting).seconds
    assert found.balanced_seconds < found.planned_seconds < found.static_seconds
    assert found.does_not_pay == ""
    gain = found.static_seconds - found.planned_seconds
    for waited, must_hide in ((0.0, False), (0.5 * gain, False), (gain, True)):
        late = estimate_plan(plan, loads, setting, planning_seconds=waited)
        assert late == replace(found, planning_seconds=waited, must_hide=must_hide)
    fast, slow = replica_bytes(outcome_of_plan(plan, loads), setting.model)
    assert found.fetched_fast_bytes + found.kept_fast_bytes == round(fast * 6)
    assert found.kept_slow_bytes == round(slow * 6)


def test_it_says_when_a_plan_does_not_pay():
    cluster, options = ClusterSpec(1, 4, 1), PlanOptions()
    even = np.full((1, 2, 8), 4096)
    found = estimate_plan(static_plan(even, cluster), even, options.setting(8, 4))
    assert "even forced balance would save no more than" in found.does_not_pay

    skewed = even.copy()
    skewed[..., 0] *= 20
    found = estimate_plan(static_plan(skewed, cluster), skewed, options.setting(8, 4))
    assert "takes 1.000 of the static one" in found.does_not_pay


def test_no_load_and_other_loads():
    cluster, setting = ClusterSpec(1, 2, 1), PlanOptions().setting(4, 2)
    none = np.zeros((1, 1, 4), np.int64)
    found = estimate_plan(static_plan(none, cluster), none, setting)
    assert (found.token_fast_bytes, found.planned_max_mean) == (0, 1.0)
    assert found.does_not_pay
    with pytest.raises(ShapeError, match="the plan is for"):
        estimate_plan(static_plan(none, cluster), np.zeros((2, 1, 4), np.int64), setting)
