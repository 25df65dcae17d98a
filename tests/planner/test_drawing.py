"""`plot` of traces and plans draws the figures that they have; without matplotlib it says what to install."""

import sys

import numpy as np
import pytest

from relibra_kernels.planner import (
    ClusterSpec,
    InputError,
    PlanOptions,
    RoutingTrace,
    ShapeError,
    plan_batch,
    static_plan,
)

CLUSTER = ClusterSpec(1, 4, replica_slots=1)


def make_loads():
    loads = np.random.default_rng(0).integers(1, 50, (3, 2, 8))
    loads[:, :, :2] *= 2  # the first rank's own, so that static placement is uneven
    loads[2] = 0
    return loads


def make_trace():
    ids = np.array([[[0, 1], [3, 2]], [[0, 2], [3, 1]], [[-1, -1], [-1, -1]]], np.int8)
    return RoutingTrace(ids, [0, 3], 4, (1, 5))


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib", reason="nothing can be drawn without it")
    import matplotlib

    matplotlib.use("agg", force=True)
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_a_trace_shows_how_often_experts_were_chosen(figures):
    ax = make_trace().plot()
    ratio = ax.images[0].get_array()
    np.testing.assert_allclose(
        ratio, [[2, 1, 1, 0], [0, 1, 1, 2]]
    )  # of known tokens, one choice an expert being the mean
    assert "2.0 times" in ax.get_title() and [t.get_text() for t in ax.get_yticklabels()][:1]
    ax.figure.canvas.draw()


def test_a_plan_shows_the_balance_it_brings(figures):
    loads = make_loads()
    plan = plan_batch(loads, CLUSTER, options=PlanOptions(balance=1.0))
    _, own = figures.subplots()
    ax = plan.plot(loads, ax=own)
    assert ax is own
    before, after = (each.imbalance(loads)[:2].mean(1) for each in (static_plan(loads, CLUSTER), plan))
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
    np.testing.assert_allclose(heights[0][:2], before)
    np.testing.assert_allclose(heights[1][:2], after)
    assert heights[1][:2].max() < heights[0][:2].min() and (heights[:, 2] == 1).all()  # a layer without load is even
    assert (
        f"{static_plan(loads, CLUSTER).imbalance_mean(loads):.3f} -> {plan.imbalance_mean(loads):.3f}" in ax.get_title()
    )
    ax.figure.canvas.draw()
    with pytest.raises(ShapeError, match="but the plan is for"):
        plan.plot(loads[:2])


def test_without_loads_a_plan_shows_what_it_does(figures):
    plan = plan_batch(make_loads(), CLUSTER, options=PlanOptions(balance=1.0))
    kept, fetched, away = ([bar.get_height() for bar in bars] for bars in plan.plot().containers)
    np.testing.assert_allclose(kept, plan.kept.sum((1, 2)))
    np.testing.assert_allclose(np.add(kept, fetched), (plan.replicas >= 0).sum((2, 3)).mean(1))
    np.testing.assert_allclose(away, (plan.home != np.repeat(np.arange(4), 2)).sum(1))
    assert sum(kept) + sum(fetched) + sum(away) > 0


def test_nothing_chosen_is_drawn_too(figures):
    empty = RoutingTrace(np.zeros((0, 1, 2), np.int8), [0], 4, (0,))
    assert empty.plot().images[0].get_array().max() == 0


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"plot needs matplotlib: pip install matplotlib"):
        make_trace().plot()
