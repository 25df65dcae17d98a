"""Guests: what they can fix that nothing inside a node can, and the flow between nodes."""

import numpy as np
import pytest
from skewed_loads import skewed_loads

from relibra_kernels.planner import ClusterSpec, plan_batch
from relibra_kernels.planner.solver.guests import NodeProblem, carry, choose_guests
from relibra_kernels.planner.solver.nodeflow import NodeFlow


def max_flow(over, room, capacity):
    """Exact, by scipy, for one micro-batch."""
    flow = pytest.importorskip("scipy.sparse.csgraph", reason="scipy is the oracle").maximum_flow
    from scipy.sparse import csr_array

    nodes = len(over)
    graph = np.zeros((nodes + 2, nodes + 2), np.int32)
    graph[0, 2:], graph[2:, 1], graph[2:, 2:] = over, room, capacity
    return flow(csr_array(graph), 0, 1).flow_value


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_flow_comes_close_to_the_maximum_and_conserves(nodes):
    rng = np.random.default_rng(nodes)
    count = 40
    load = rng.integers(0, 200, (nodes, count))
    capacity = -(-load.sum(0) // nodes)
    edges = rng.integers(0, 80, (nodes, nodes, count)) * (rng.random((nodes, nodes, 1)) < 0.5)
    edges[np.arange(nodes), np.arange(nodes)] = 0
    flow = NodeFlow(load, capacity)
    over, room = flow.over_NX.copy(), flow.room_NX.copy()
    flow.residual_NNX += edges
    for _ in range(3):
        flow.push()
    assert flow.over_NX.min() >= 0
    assert flow.room_NX.min() >= 0
    assert flow.residual_NNX.min() >= 0
    np.testing.assert_array_equal((over - flow.over_NX).sum(0), (room - flow.room_NX).sum(0))
    net = (edges - flow.residual_NNX).sum(1)  # what leaves each node, less what arrives
    np.testing.assert_array_equal(net, (over - flow.over_NX) - (room - flow.room_NX))
    best = sum(max_flow(over[:, x], room[:, x], edges[:, :, x]) for x in range(count))
    assert (over - flow.over_NX).sum() >= 0.9 * best


def test_edges_added_one_by_one_carry_nearly_all_that_pushing_finds():
    """`add` looks only at ways over the new edge, in a fixed number of steps; the flow is about the same."""
    rng = np.random.default_rng(0)
    nodes, layers, micro_batches = 6, 4, 8
    load = rng.integers(0, 200, (nodes, layers * micro_batches))
    flow = NodeFlow(load, -(-load.sum(0) // nodes))
    over, room = flow.over_NX.copy(), flow.room_NX.copy()
    total = np.zeros((nodes, nodes, layers, micro_batches), np.int64)
    for _ in range(12):
        layer = np.sort(rng.permutation(layers)[:3])
        start = rng.integers(0, nodes, 3)
        end = (start + rng.integers(1, nodes, 3)) % nodes
        amount = rng.integers(0, 40, (3, micro_batches))
        flow.add(layer, start, end, amount)
        total[start, end, layer] += amount
    sent = over - flow.over_NX
    assert min(flow.over_NX.min(), flow.room_NX.min(), flow.residual_NNX.min()) >= 0
    net = (total.reshape(nodes, nodes, -1) - flow.residual_NNX).sum(1)
    np.testing.assert_array_equal(net, sent - (room - flow.room_NX))
    flow.push()
    pushed = over - flow.over_NX
    assert pushed.sum() > 0 and sent.sum() >= 0.95 * pushed.sum()


def test_chosen_guests_carry_what_they_were_chosen_for():
    table = skewed_loads(3, 6, 32)
    node = np.tile(np.arange(32) // 8, (3, 1))
    problem = NodeProblem(table, node, -(-table.sum(2) // 16), num_nodes=4, gpus_per_node=4, fill=0.5)
    assert np.bincount(choose_guests(problem, per_node=1)[0].layer).max() <= 4
    guests, taken = choose_guests(problem, per_node=4)
    assert len(guests)
    assert (guests.donor == node[guests.layer, guests.expert]).all()
    assert (guests.donor != guests.node).all()
    np.testing.assert_array_equal(carry(problem, guests), taken)
    assert (taken <= problem.capacity_LM[guests.layer]).all()


@pytest.mark.parametrize(("nodes", "experts", "slots"), [(4, 64, 2), (4, 32, 2), (8, 128, 2)])
def test_balance_at_scale(nodes, experts, slots):
    loads = skewed_loads(6, 16, experts)
    cluster = ClusterSpec(nodes, 8, slots)
    plan = plan_batch(loads, cluster)
    assert plan.imbalance_mean(loads) <= 1.003
    assert plan.imbalance_worst(loads) <= 1.02
    sent = ((plan.replicas >= 0) & ~plan.kept[:, None]).sum((2, 3))
    assert sent.mean() <= cluster.num_ranks - nodes
    assert plan.kept.sum(2).max() <= 1


def test_guests_are_spread_over_the_ranks_of_a_node():
    """Over many layers the ranks of a node hold about the same number; the plan is as balanced as it was."""
    loads = skewed_loads(24, 8, 64)
    plan = plan_batch(loads, ClusterSpec(4, 8, 2))
    held = plan.kept.sum((0, 2)).reshape(4, 8)
    assert held.sum() > 24
    assert (held.max(1) - held.min(1)).max() <= 1
    assert plan.imbalance_mean(loads) <= 1.003


def test_one_assignment_a_rank():
    loads = np.array([[[3, 1, 0, 0]]])
    assert plan_batch(loads, ClusterSpec(2, 2, 2)).imbalance_worst(loads) == 1
