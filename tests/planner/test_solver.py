"""The parts of the solver: the exact split against linear programs, kept replicas against their caps, fetched ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skewed_loads import skewed_loads

from relibra_kernels.planner import ClusterSpec
from relibra_kernels.planner.plan import contiguous_home
from relibra_kernels.planner.solver.exact import PairFlow
from relibra_kernels.planner.solver.fetched import Slots, fetch
from relibra_kernels.planner.solver.fetched_by_flow import fetch_by_flow
from relibra_kernels.planner.solver.home_swaps import swap_homes
from relibra_kernels.planner.solver.hosts import Hosts, Sums, best_host
from relibra_kernels.planner.solver.kept import NodeRule, choose_replicas, pack, shares
from relibra_kernels.planner.solver.relaxed import preference, relaxed_split, whole_split
from relibra_kernels.planner.solver.solution import Solution


def lowest_busiest(load_E, hosts, ranks):
    """The optimum of the linear program, by HiGHS. hosts: the ranks of every expert."""
    linprog = pytest.importorskip("scipy.optimize", reason="scipy is the oracle").linprog
    pairs = [(e, r) for e, of_expert in enumerate(hosts) for r in of_expert]
    a_eq = np.array([[float(p[0] == e) for p in pairs] + [0.0] for e in range(len(hosts))])
    a_ub = np.array([[float(p[1] == r) for p in pairs] + [-1.0] for r in range(ranks)])
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1
    return linprog(cost, a_ub, np.zeros(ranks), a_eq, load_E).fun


def random_flow(rng, pairs, experts, ranks):
    """Pairs with hosts at random, all at the first host; the flow, and the loads and hosts of every pair."""
    table = np.floor(np.exp(rng.normal(0, 1.5, (pairs, experts))) * rng.choice([3, 100, 5000])).astype(np.int64)
    hosts = [
        [np.sort(rng.permutation(ranks)[: rng.choice([1, 1, 2, 3])]) for _ in range(experts)] for _ in range(pairs)
    ]
    load = np.zeros((pairs, ranks), np.int64)
    expert, rank, split = [], [], []
    for p in range(pairs):
        for e, of_expert in enumerate(hosts[p]):
            load[p, of_expert[0]] += table[p, e]
            if len(of_expert) > 1:
                expert += [p * experts + e] * len(of_expert)
                rank += (p * ranks + of_expert).tolist()
                split += [table[p, e], *[0] * (len(of_expert) - 1)]
    arrays = (np.array(x, np.int64) for x in (expert, rank, split))
    return PairFlow(*arrays, load.reshape(-1), experts, ranks), table, hosts


def test_the_split_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(12):
        ranks, experts = int(rng.integers(3, 8)), int(rng.integers(4, 16))
        flow, table, hosts = random_flow(rng, 12, experts, ranks)
        before = np.bincount(flow.expert, weights=flow.split)
        limit = flow.level(-(-table.sum(1) // ranks))
        optimum = [lowest_busiest(*each, ranks) for each in zip(table, hosts, strict=True)]
        np.testing.assert_array_equal(limit, np.ceil(np.array(optimum) - 1e-6))
        assert (flow.busiest() <= limit).all()
        assert flow.split.min() >= 0
        np.testing.assert_array_equal(np.bincount(flow.expert, weights=flow.split), before)


def hosts_of(table, ranks, gpus, slots, spread=True, copies=None):
    layers, _, experts = table.shape
    home = contiguous_home(layers, experts, ranks)
    share = shares(table, ranks)
    total = slots * ranks * layers if copies is None else copies * ranks
    layer, expert = choose_replicas(share, total, slots * ranks, ranks)
    most = slots * layers if copies is None else copies
    kept = pack(share, home, layer, expert, ClusterSpec(ranks // gpus, gpus, slots), most, NodeRule(spread))
    return kept, Hosts.of(home, kept.layer, kept.expert, kept.rank, gpus, ranks), home


def test_sums_are_those_of_rows_with_the_same_key_in_their_order():
    """Floating point tells the order: 1e16 + 1 + 1 is not 1e16 + 2. A key without rows is 0."""
    key, rows = np.array([2, 0, 2, 0, 2]), np.array([[1e16], [3.0], [1.0], [4.0], [1.0]])
    np.testing.assert_array_equal(Sums.by(key, 4)(rows), [[7.0], [0.0], [(1e16 + 1.0) + 1.0], [0.0]])
    assert (1e16 + 1.0) + 1.0 != 1e16 + (1.0 + 1.0)
    assert Sums.by(np.zeros(0, np.int64), 2)(np.zeros((0, 3), np.int64)).tolist() == [[0] * 3] * 2


def test_the_relaxed_split_levels_what_can_be():
    table = skewed_loads(4, 8, 64, mean=4000)
    _, hosts, _ = hosts_of(table, 16, 4, 2)
    load = table.swapaxes(1, 2).reshape(-1, 8).astype(float)
    wanted = (load / 4)[hosts.expert[hosts.first_of_node]]
    split = relaxed_split(hosts, load, preference(hosts, wanted, load), 60, 1e-3)
    at_rank = hosts.by_rank(split)
    np.testing.assert_allclose(np.add.reduceat(split, hosts.first, axis=0), load, rtol=1e-9)
    mean = np.repeat(table.sum(2).T[None] / 16, 1, axis=0)[0].T
    assert (at_rank.reshape(4, 16, 8).max(1) / mean).mean() < 1.01
    whole = whole_split(hosts, split, load)
    assert np.abs(whole - split).max() <= 1
    np.testing.assert_array_equal(np.add.reduceat(whole, hosts.first, axis=0), load.astype(int))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 4, 1, None), (16, 4, 2, 3), (6, 1, 2, 1), (12, 3, 3, 0)]))
def test_kept_replicas_obey_their_caps(seed, shape):
    ranks, gpus, slots, copies = shape
    table = skewed_loads(3, 4, ranks * 3, seed=seed)
    kept, _, home = hosts_of(table, ranks, gpus, slots, copies=copies)
    place = np.zeros((3, ranks), int)
    np.add.at(place, (kept.layer, kept.rank), 1)
    assert place.max() <= slots
    assert place.sum(0).max() <= (slots * 3 if copies is None else copies)
    assert len({*zip(kept.layer, kept.expert, kept.rank, strict=True)}) == len(kept.layer)
    assert (home[kept.layer, kept.expert] != kept.rank).all()


def test_copies_go_to_what_is_hot_at_once_and_to_different_nodes():
    """Expert 0 is hot in one micro-batch only, yet needs hosts as one that is always hot does."""
    table = np.full((1, 4, 16), 10)
    table[0, 2, 0], table[0, :, 5] = 700, 60
    _, expert = choose_replicas(shares(table, 8), 4, 4, 8)
    assert sorted(expert)[:3] == [0, 0, 0]
    kept, _, _ = hosts_of(np.where(np.arange(16) == 3, 900, table), 8, 2, 1)
    assert {1, 2, 3} <= set((kept.rank[kept.expert == 3] // 2).tolist())


@pytest.mark.parametrize("far", [3, 5])
def test_a_home_sends_kept_replicas_to_so_many_other_nodes(far):
    table, ranks, gpus = skewed_loads(3, 4, 64, sigma=1.5), 32, 4
    home, share = contiguous_home(3, 64, ranks), shares(table, ranks)
    layer, expert = choose_replicas(share, 3 * ranks, ranks, ranks)
    sent = []
    for limit in (None, far):
        kept = pack(share, home, layer, expert, ClusterSpec(8, gpus, 2), 6, NodeRule(True, limit))
        assert len(kept.layer) == 3 * ranks
        owner = home[kept.layer, kept.expert]
        trips = {*zip(kept.layer, kept.expert, owner, kept.rank // gpus, strict=True)}
        of_home = np.zeros((3, ranks), int)
        for at, _, rank, node in trips:
            of_home[at, rank] += rank // gpus != node
        sent.append(of_home.max())
    assert sent[1] == far < sent[0]


def test_layers_compete_for_memory():
    table = np.concatenate([skewed_loads(1, 4, 32, sigma=0.1), skewed_loads(1, 4, 32, sigma=1.5)])
    layer, _ = choose_replicas(shares(table, 8), 8, 16, 8)
    assert (layer == 1).sum() == 8


@pytest.mark.parametrize(("most", "home", "place"), [(0, [0, 0, 1, 1], [0, 1, 8, 9]), (1, [0, 1, 0, 1], [0, 8, 1, 9])])
def test_homes_are_swapped_where_experts_are_hot_at_once(most, home, place):
    """Experts 0 and 1 are hot in the first micro-batch, 2 and 3 in the second: together they overload either rank."""
    loads = np.array([[[40, 40, 10, 10], [5, 5, 45, 45], [30, 50, 10, 10]]])
    empty = np.full((1, 3, 2, 1), -1, np.int32)
    solution = Solution(np.array([[0, 0, 1, 1]]), empty, np.zeros_like(empty), np.zeros((1, 2, 1), np.bool_))
    places = np.array([[0, 1, 8, 9]])
    swap_homes(loads, solution, places, np.full((1, 3), 50), most, 8)
    np.testing.assert_array_equal(solution.home[0], home)
    np.testing.assert_array_equal(places[0], place)


@pytest.mark.parametrize(("load", "busiest"), [([30, 20, 25, 25], 50), ([60, 20, 10, 10], 70)])
def test_homes_are_swapped_as_far_as_that_helps(load, busiest):
    empty = np.full((1, 2, 2, 1), -1, np.int32)
    solution = Solution(np.array([[0, 0, 1, 1]]), empty, np.zeros_like(empty), np.zeros((1, 2, 1), np.bool_))
    places = np.array([[0, 0, 1, 1]])
    swap_homes(np.array([[load, load]]), solution, places, np.full((1, 2), 50), 4, 8)
    assert np.bincount(solution.home[0], weights=load).max() == busiest
    np.testing.assert_array_equal(places, solution.home)


def test_fetching_fills_a_node_exactly():
    load = np.array([[[90, 60], [20, 10], [10, 5], [3, 2]]])
    expert = np.concatenate([np.arange(8).reshape(1, 4, 2), np.full((1, 4, 2), -1)], 2)
    slots = Slots(expert, np.concatenate([load, load * 0], 2), np.full((1, 4), 2), np.zeros((1, 4, 4), bool))
    sent = fetch(slots, np.array([50]), 4)
    assert slots.load.sum(2).tolist() == [[50, 50, 50, 50]]
    assert sent.tolist() == [3]
    assert slots.fetched.sum() == 3


@pytest.mark.parametrize("how", ["kept", "fetched", "fetched_by_flow"])
def test_of_ranks_that_are_as_good_the_lowest_hosts(how):
    """One expert a rank, of which that on rank 1 has all the load; ranks 0, 2 and 3 are idle."""
    assert best_host(np.array([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])).tolist() == [1, 0]
    loads = np.array([[[0, 8, 0, 0]]])
    if how == "kept":
        chosen = np.array([0]), np.array([1])
        copies = pack(shares(loads, 4), np.arange(4)[None], *chosen, ClusterSpec(1, 4, 1), 1, NodeRule(spread=True))
        assert copies.rank.tolist() == [0]
        return
    expert = np.stack([np.arange(4), np.full(4, -1)], 1)[None]
    load = np.stack([loads[0, 0], np.zeros(4, np.int64)], 1)[None]
    slots = Slots(expert.copy(), load.copy(), np.ones((1, 4), np.int64), np.zeros((1, 4, 2), np.bool_))
    target = np.array([4])  # so that one replica is enough
    if how == "fetched":
        fetch(slots, target, 4)
    else:
        fetch_by_flow(slots, target, 4, 4, 4, 4)
    assert slots.expert[0, :, 1].tolist() == [1, -1, -1, -1]
