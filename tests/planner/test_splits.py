"""Splits over source ranks: exact margins, near before far, and the destination of each assignment."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relibra_kernels.planner import (
    BatchPlan,
    ClusterSpec,
    PlanError,
    PlanOptions,
    ShapeError,
    destinations,
    plan_batch,
    split_of_source,
)

LEVEL = PlanOptions(balance=1.0)  # so that there are replicas, whatever they cost


def split_over_sources(plan, loads, layer, micro_batch):
    """[R_src, E, R_dst]: of every source, as it derives it by itself."""
    return np.stack([split_of_source(plan, loads, layer, micro_batch, rank) for rank in range(plan.num_ranks)])


@st.composite
def problems(draw):
    nodes, gpus = draw(st.sampled_from([(1, 2), (2, 2), (1, 4), (2, 4), (3, 1)]))
    ranks = nodes * gpus
    experts = ranks * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = rng.integers(0, draw(st.sampled_from([1, 3, 100, 100000])), (2, 2, ranks, experts), endpoint=True)
    loads[..., rng.integers(0, experts, 2)] *= draw(st.sampled_from([1, 10]))
    loads[:, :, rng.integers(0, ranks)] *= draw(st.sampled_from([0, 1]))
    return loads, ClusterSpec(nodes, gpus, draw(st.integers(0, 3)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_margins_are_exact(problem):
    loads, cluster = problem
    plan = plan_batch(loads, cluster, options=LEVEL)
    per_rank = plan.rank_loads(loads)
    for layer in range(2):
        for micro_batch in range(2):
            split = split_over_sources(plan, loads, layer, micro_batch)
            assert split.dtype == np.int32
            assert split.min() >= 0
            np.testing.assert_array_equal(split.sum(2), loads[layer, micro_batch])
            np.testing.assert_array_equal(split.sum((0, 1)), per_rank[layer, micro_batch])
            hosts = split.sum(0)  # [E, R]
            for rank in range(cluster.num_ranks):
                for slot in range(cluster.replica_slots):
                    expert = plan.replicas[layer, micro_batch, rank, slot]
                    if expert >= 0:
                        assert hosts[expert, rank] == plan.quota[layer, micro_batch, rank, slot]


@settings(max_examples=40, deadline=None)
@given(problems())
def test_near_comes_first(problem):
    loads, cluster = problem
    plan = plan_batch(loads, cluster, options=LEVEL)
    node = np.arange(cluster.num_ranks) // cluster.gpus_per_node
    split = split_over_sources(plan, loads, 0, 0)
    hosts = split.sum(0)
    for expert in range(plan.num_experts):
        have, take, sent = loads[0, 0, :, expert], hosts[expert], split[:, expert]
        np.testing.assert_array_equal(np.diag(sent), np.minimum(have, take))
        for n in range(cluster.num_nodes):
            inside = node == n
            local = np.minimum(have, take)[inside].sum()
            left = min(have[inside].sum() - local, take[inside].sum() - local)
            assert sent[np.ix_(inside, inside)].sum() == local + left


def test_the_rest_follows_the_largest_remainder():
    """Two sources without a host of their own; expert 0 is on ranks 0 and 1 of another node, 5 and 4 assignments."""
    loads = np.zeros((1, 1, 4, 4), np.int64)
    loads[0, 0, 2, 0], loads[0, 0, 3, 0] = 3, 6
    replicas = np.full((1, 1, 4, 1), -1)
    quota = np.zeros((1, 1, 4, 1), int)
    replicas[0, 0, 1, 0], quota[0, 0, 1, 0] = 0, 4
    plan = BatchPlan(np.arange(4)[None], replicas, quota, np.zeros((1, 4, 1), bool), gpus_per_node=2, loads=loads)
    split = split_over_sources(plan, loads, 0, 0)
    assert split[2, 0].tolist() == [2, 1, 0, 0]  # 3 * 5 / 9 = 1.67, 3 * 4 / 9 = 1.33
    assert split[3, 0].tolist() == [3, 3, 0, 0]


def test_a_plan_for_other_loads_is_refused():
    rng = np.random.default_rng(0)
    loads = rng.integers(0, 50, (1, 1, 4, 8))
    loads[..., 0] = 1000
    plan = plan_batch(loads, ClusterSpec(1, 4), options=LEVEL)
    with pytest.raises(PlanError, match="expert 0 in layer 0"):
        split_over_sources(plan, np.ones_like(loads), 0, 0)
    with pytest.raises(ShapeError, match="source ranks"):
        split_over_sources(plan, loads.sum(2), 0, 0)


def test_destinations_follow_the_split_in_token_order():
    rng = np.random.default_rng(3)
    ids = rng.random((50, 8)).argsort(-1)[:, :2].astype(np.int8)
    ids[7] = -1
    loads = np.zeros((1, 1, 4, 8), np.int64)
    loads[0, 0, 0] = np.bincount(ids[ids >= 0], minlength=8)
    loads[0, 0, 1:] = rng.integers(0, 30, (3, 8))
    loads[..., 2] += 500
    loads[0, 0, 0, 2] -= 500
    plan = plan_batch(loads, ClusterSpec(1, 4), options=LEVEL)
    split = split_over_sources(plan, loads, 0, 0)[0]
    got = destinations(ids, split)
    seen = dict.fromkeys(range(8), 0)
    for t in range(50):
        for k in range(2):
            expert = int(ids[t, k])
            if expert < 0:
                assert got[t, k] == -1
                continue
            assert got[t, k] == np.searchsorted(np.cumsum(split[expert]), seen[expert], side="right")
            seen[expert] += 1
    with pytest.raises(ShapeError, match="do not fit"):
        destinations(ids[1:], split)
