"""Hugging Face models on two ranks through `DistributedConfig`: one process's results, also under a plan."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="earlier ones have no expert parallelism to join")
pytest.importorskip("accelerate", reason="transformers needs it for a DistributedConfig")
from hf_parallel import LENGTH, MICRO_BATCHES, SEQUENCES, micro_batches_of, one_process, refusals, run_on_rank, shifted
from ranks import Ranks
from tolerance import assert_close

from relibra_kernels.integrations.transformers import expert_parallel, planned_batch
from relibra_kernels.nn import ExpertForm
from relibra_kernels.planner import (
    BatchPlan,
    ClusterSpec,
    PlanOptions,
    RoutingTrace,
    load_table,
    plan_batch,
    static_plan,
)
from relibra_kernels.planner.plan import contiguous_home

RANKS, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(RANKS)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def skewed(trace: RoutingTrace) -> RoutingTrace:
    """Routing of the same tokens that keeps rank 0 busy and uses replicas."""
    random = np.random.default_rng(0)
    popularity = np.array([9, 5, 4, 3, 1, 1, 1, 1])
    keys = random.random((*trace.expert_ids.shape[:2], EXPERTS)) ** (1 / popularity)
    ids = keys.argsort(-1)[..., ::-1][..., : trace.top_k].astype(np.int8)
    return RoutingTrace(ids, trace.offsets, EXPERTS, trace.moe_layer_ids)


def plan_of(trace: RoutingTrace) -> BatchPlan:
    """The plan for all ranks' sequences, experts in place."""
    rank = np.arange(SEQUENCES) % RANKS
    groups = np.zeros(SEQUENCES, int)
    for r in range(RANKS):
        mine, of_mine = micro_batches_of(r, RANKS)
        groups[mine] = of_mine
    loads = load_table(trace, groups, rank, MICRO_BATCHES, RANKS)
    home = contiguous_home(trace.num_layers, EXPERTS, RANKS)
    plan = plan_batch(
        loads, ClusterSpec(1, RANKS, 2), previous_home=home, options=PlanOptions(balance=1.0, max_moves=0)
    )
    assert (plan.home == home).all() and (plan.replicas >= 0).any((2, 3)).any()
    return plan


def check(results, expected):
    for rank, result in enumerate(results):
        mine, _ = micro_batches_of(rank, len(results))
        assert np.abs(result["logits"] - expected["logits"].numpy()[mine]).max() <= 1e-5
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in result["gradients"].items():
            assert_close(torch.from_numpy(gradient), expected["gradients"][name], 1e-5, name)


def replica_bytes(results):
    return [sum(n for (kind, _), n in result["bytes"].items() if kind == "replica_weights") for result in results]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_without_a_plan(two_ranks, family):
    results = two_ranks.run(run_on_rank, family, RANKS, "live", None, None)
    check(results, one_process(family))
    assert replica_bytes(results) == [0, 0]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_under_a_plan_with_replicas(two_ranks, family):
    """Routers replay the trace; every size is known before the step."""
    trace = skewed(one_process(family)["trace"])
    results = two_ranks.run(run_on_rank, family, RANKS, "plan and trace", trace, None)
    check(results, one_process(family, trace))
    plan = plan_of(trace)
    expert = {"qwen3_moe": 3 * 24 * 32, "gpt_oss": 3 * 24 * 32 + 2 * 24 + 32}[family] * 4  # bytes
    pushes = 2 * int((plan.replicas >= 0).sum()) * expert  # for forward and again for backward
    assert results[0]["replicas"] > 0 and sum(replica_bytes(results)) == pushes


@pytest.mark.parametrize("transport", ["one", "two"])
def test_under_a_plan_on_two_nodes(four_ranks, transport):
    """With a trace, and without one; each hop is of ranks that the plan has on one node, or on one rail."""
    trace = skewed(one_process("qwen3_moe")["trace"])
    results = four_ranks.run(run_on_rank, "qwen3_moe", 4, "plan and trace", trace, None, 2, transport)
    check(results, one_process("qwen3_moe", trace))
    plan = static_plan(np.zeros((trace.num_layers, MICRO_BATCHES, EXPERTS), np.int32), ClusterSpec(2, 2))
    live = four_ranks.run(run_on_rank, "qwen3_moe", 4, "plan", None, plan, 2, transport)
    check(live, one_process("qwen3_moe"))
    assert [result["hops"] for result in (*results, *live)] == [transport] * 8
    assert results[0]["replicas"] > 0 and results[0]["bytes"]["dispatch", "slow"] > 0


def test_under_a_plan_with_live_routing(two_ranks):
    """The plan alone: a layer exchanges its counts. Here the routing is what the plan was made for."""
    trace = one_process("qwen3_moe")["trace"]
    plan = plan_of(trace)
    results = two_ranks.run(run_on_rank, "qwen3_moe", RANKS, "plan", None, plan)
    check(results, one_process("qwen3_moe"))
    assert sum(replica_bytes(results)) > 0


def test_quotas_beyond_the_live_load_are_cut(two_ranks):
    plan = plan_of(skewed(one_process("qwen3_moe")["trace"]))
    greedy = replace(plan, quota=np.where(plan.replicas >= 0, 10 * SEQUENCES * LENGTH, 0), loads_sha256="")
    results = two_ranks.run(run_on_rank, "qwen3_moe", RANKS, "plan", None, greedy)
    check(results, one_process("qwen3_moe"))


def test_replay_without_a_plan(two_ranks):
    trace = skewed(one_process("qwen3_moe")["trace"])
    check(two_ranks.run(run_on_rank, "qwen3_moe", RANKS, "replay", trace, None), one_process("qwen3_moe", trace))


def test_a_record_of_something_else_is_refused(two_ranks):
    trace = one_process("qwen3_moe")["trace"]
    assert two_ranks.run(shifted, "qwen3_moe", RANKS, trace, "refuse") == ["", ""]
    for message in two_ranks.run(shifted, "qwen3_moe", RANKS, skewed(trace), "refuse"):
        assert "agrees with the model's own choice" in message and "layer 0" in message
    assert two_ranks.run(shifted, "qwen3_moe", RANKS, skewed(trace), "ignore") == ["", ""]


def test_a_micro_batch_is_of_the_batch_that_opened_last(monkeypatch):
    """Of two models whose batches are open, one within the other, in whatever order they were loaded."""
    runners = [SimpleNamespace(batch=batch and SimpleNamespace(serial=batch)) for batch in (5, 9, None, 7)]
    layers = [SimpleNamespace(runner=runner) for runner in (*runners, None)]
    for order in (layers, layers[::-1]):
        monkeypatch.setattr(expert_parallel, "_IMPLEMENTATIONS", dict(enumerate(order)))
        assert expert_parallel.runner_of_open_batch() is runners[1]


@pytest.mark.parametrize(("form", "matrices"), [(ExpertForm(), 3), (ExpertForm(activation="relu2"), 2)])
def test_experts_without_a_gate_are_priced_as_two_matrices(form, matrices):
    experts = SimpleNamespace(down_proj=torch.zeros(4, 8, 16))
    implementation = SimpleNamespace(experts=experts, form=form, num_experts=8)
    shape = planned_batch._shape_of([SimpleNamespace(top_k=2)] * 3, implementation)
    assert shape.expert_bytes == matrices * 8 * 16 * 2


def test_refusals(two_ranks):
    trace = skewed(one_process("qwen3_moe")["trace"])
    for messages in two_ranks.run(refusals, "qwen3_moe", RANKS, trace, plan_of(trace)):
        for message, expected in zip(
            messages,
            [
                "shards experts by id",
                "other loads",
                "trace and micro_batch_of_sequence go together",
                "no experts under ep_implementation 'relibra'",
                "outside of a micro-batch",
                "rows of [9, 9, 9, 9] tokens",
                "outside of batch",
            ],
            strict=True,
        ):
            assert expected in message
