"""Placement: balance over micro-batches, few moves from a previous placement, labels matched exactly."""

import numpy as np
import pytest
from skewed_loads import skewed_loads

from relibra_kernels.planner import ClusterSpec, InputError, PlanOptions, plan_batch
from relibra_kernels.planner.solver.matching import match_labels
from relibra_kernels.planner.solver.placement import _relabel, place


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_match_labels_is_optimal(size):
    assign = pytest.importorskip("scipy.optimize", reason="scipy is the oracle").linear_sum_assignment
    overlap = np.random.default_rng(size).integers(0, 5, (60, size, size))
    label = match_labels(overlap)
    for problem, chosen in zip(overlap, label, strict=True):
        assert sorted(chosen) == list(range(size))
        assert problem[np.arange(size), chosen].sum() == problem[assign(-problem)].sum()


def busiest_node(table, home, gpus):
    nodes = (home.max() + 1) // gpus
    load = np.stack([(table * (home // gpus == n)[:, None]).sum(2) for n in range(nodes)])
    return load.max(0).sum()


def test_polish_lowers_the_busiest_node():
    table = skewed_loads(8, 8, 64)
    assert busiest_node(table, place(table, 4, 4, polish=True), 4) < busiest_node(table, place(table, 4, 4), 4)


def test_experts_that_are_hot_together_are_kept_apart():
    """Totals say nothing here: every expert has the same. Only the micro-batches tell which pairs clash."""
    table = np.full((1, 2, 4), 10)
    table[0, 0, :2] = table[0, 1, 2:] = 90
    home = place(table, 2, 1)[0]
    assert home[0] != home[1]
    assert home[2] != home[3]


def test_a_placement_that_still_fits_does_not_move():
    table = skewed_loads(4, 8, 64)
    home = place(table, 4, 4)
    np.testing.assert_array_equal(place(table, 4, 4, previous_home=home), home)


def test_groups_keep_the_label_that_moves_fewest():
    """Two groups that have exchanged their experts but for one each are the old groups under swapped labels."""
    before = np.array([[0, 0, 0, 1, 1, 1]])
    members = np.array([[[3, 4, 0], [1, 2, 5]]])
    assert _relabel(members, before).tolist() == [[[1, 2, 5], [3, 4, 0]]]
    assert _relabel(members[:, ::-1], before).tolist() == [[[1, 2, 5], [3, 4, 0]]]


def test_fewer_experts_move_from_a_previous_placement():
    before, now = skewed_loads(4, 8, 64, seed=1), skewed_loads(4, 8, 64, seed=1)
    now[..., :8] = skewed_loads(4, 8, 64, seed=2)[..., :8]
    home = place(before, 4, 4)
    moved = (place(now, 4, 4, previous_home=home) != home).sum()
    assert moved < (place(now, 4, 4) != home).sum() / 2


@pytest.mark.parametrize("max_moves", [0, 1, 2, 4, 16])
def test_the_migration_budget_is_kept(max_moves):
    home = place(skewed_loads(4, 8, 64, seed=1), 4, 4)
    table = skewed_loads(4, 8, 64, seed=5)
    plan = plan_batch(table, ClusterSpec(4, 4), previous_home=home, options=PlanOptions(max_moves=max_moves))
    assert (plan.home != home).sum(1).max() <= max_moves


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"balance": 0.9}, "balance is 0.9"),
        ({"balance": float("nan")}, "balance is nan"),
        ({"effort": "some"}, "effort is 'some'"),
        ({"kept_bytes": -1}, "kept_bytes is -1"),
        ({"kept_bytes": float("inf")}, "kept_bytes is inf"),
        ({"fetched_slots": 1.5}, "fetched_slots is 1.5"),
        ({"transport": "three"}, "transport is 'three'"),
        ({"max_moves": -1}, "max_moves is -1"),
    ],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        PlanOptions(**values)
