"""Replication against exact optima, and what balance costs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skewed_loads import skewed_loads

from relibra_kernels.planner import ClusterSpec, PlanOptions, plan_batch


def optimum(loads_E, home_E, ranks, slots):
    """The lowest busiest rank over all choices of replicas in one node: a linear program for each choice."""
    linprog = pytest.importorskip("scipy.optimize", reason="scipy is the oracle").linprog
    experts = len(loads_E)
    best = np.inf
    choices = [
        [c for n in range(slots + 1) for c in itertools.combinations([e for e in range(experts) if home_E[e] != r], n)]
        for r in range(ranks)
    ]
    full = [[c for c in of_rank if len(c) == max(map(len, of_rank))] for of_rank in choices]  # more hosts never hurt
    for hosts in itertools.product(*full):
        pairs = [(e, r) for e in range(experts) for r in range(ranks) if home_E[e] == r or e in hosts[r]]
        a_eq = np.array([[float(p[0] == e) for p in pairs] + [0.0] for e in range(experts)])
        a_ub = np.array([[float(p[1] == r) for p in pairs] + [-1.0] for r in range(ranks)])
        cost = np.zeros(len(pairs) + 1)
        cost[-1] = 1
        best = min(best, linprog(cost, a_ub, np.zeros(ranks), a_eq, loads_E).fun)
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(3, 3, 1), (3, 6, 1), (2, 4, 2)]))
def test_within_two_percent_of_the_optimum(seed, shape):
    ranks, experts, slots = shape
    rng = np.random.default_rng(seed)
    loads = np.floor(np.exp(rng.normal(0, 1.2, (1, 1, experts))) * 1000).astype(np.int64)
    plan = plan_batch(loads, ClusterSpec(1, ranks, slots))
    best = optimum(loads[0, 0], plan.home[0], ranks, slots)
    assert plan.rank_loads(loads).max() <= max(np.ceil(best), np.ceil(loads.sum() / ranks)) * 1.02


def test_slots_as_many_as_home_experts_balance_a_node_exactly():
    loads = skewed_loads(8, 8, 16, sigma=2)
    plan = plan_batch(loads, ClusterSpec(1, 8, 2))
    np.testing.assert_array_equal(plan.rank_loads(loads).max(2), -(-loads.sum(2) // 8))


def test_good_enough_costs_less():
    loads = skewed_loads(6, 8, 64)
    cluster = ClusterSpec(4, 8, 2)
    counts, guests = [], []
    for balance in (1.0, 1.02, 1.05, 1.2):
        plan = plan_batch(loads, cluster, options=PlanOptions(balance=balance))
        assert plan.imbalance_mean(loads) <= balance + 1e-3
        guests.append(int(plan.kept.sum()))
        counts.append(int(((plan.replicas >= 0) & ~plan.kept[:, None]).sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[1] < 0.9 * counts[0]
    assert guests == sorted(guests, reverse=True)


def test_uniform_routing_is_left_alone():
    rng = np.random.default_rng(0)
    for loads in (np.full((2, 4, 64), 500), rng.poisson(500, (2, 4, 64))):
        plan = plan_batch(loads, ClusterSpec(4, 8, 2))
        assert not (plan.replicas >= 0).any()
        assert (plan.home == np.arange(64) // 2).all()


def test_fast_is_nearly_as_good():
    loads = skewed_loads(6, 16, 128)
    plan = plan_batch(loads, ClusterSpec(8, 8, 2), options=PlanOptions(effort="fast"))
    assert plan.imbalance_mean(loads) <= 1.01
