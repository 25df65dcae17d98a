"""What a batch reports; and tokens that chose other experts than were recorded: counted, and still exact."""

import json
from dataclasses import fields

import numpy as np
import pytest
from ep_stats import differing_routes, planned_elsewhere, stats_of_batch
from ranks import Ranks
from toy_training import Case, make_batch
from training_checks import worst_error

from relibra_kernels.planner import BatchPlan


@pytest.mark.parametrize("unrecorded", [0.0, 0.1])
def test_stats_of_a_batch(ranks, unrecorded):
    case = Case(plan="planned", unrecorded=unrecorded, sequence_lengths=(12,) * 8)
    results = ranks(2).run(stats_of_batch, case)
    recorded = int((make_batch(case, 0)[0].expert_ids >= 0).sum())
    computed = np.array([counts for *_, counts in results])  # [ranks, micro-batches * layers]
    assert computed.shape == (2, 2 * 2) and computed.min() > 0
    for rank, (stats, line, ranges, _) in enumerate(results):
        assert json.loads(line) == stats and "\n" not in line
        assert stats["rank"] == rank and stats["layers_run"] == 2 * 2
        assert stats["planned_max_mean"] >= 1 and stats["differing_tokens"] == 0
        assert stats["actual_max_mean"] == pytest.approx((computed.max(0) / computed.mean(0)).mean(), rel=1e-12)
        assert computed.sum() - stats["unknown_tokens"] * case.layers * case.top_k == recorded
        assert (stats["unknown_tokens"] > 0) == (unrecorded > 0)
        if not unrecorded:  # the plan does not know what unrecorded tokens choose
            assert stats["actual_max_mean"] == pytest.approx(stats["planned_max_mean"])
        assert {"dispatch", "compute", "combine", "replica", "migration", "tables", "live"} == stats["seconds"].keys()
        assert all(stats["seconds"][part] > 0 for part in ("dispatch", "compute", "combine", "tables"))
        assert (stats["seconds"]["live"] > 0) == (unrecorded > 0)
        assert stats["bytes"]["dispatch"]["fast"] > 0 and stats["bytes"]["dispatch"]["slow"] == 0
        assert {"relibra::dispatch", "relibra::compute", "relibra::combine"} <= set(ranges)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_plans_may_be_made_elsewhere(executor):
    """Also in a process that knows nothing of the group."""
    ranks = Ranks(2, daemon=False)
    try:
        plans = [plan for both in ranks.run(planned_elsewhere, Case(), executor) for plan in both]
    finally:
        ranks.close()
    assert (plans[0].replicas >= 0).any()
    for plan in plans:
        for field in fields(BatchPlan):
            np.testing.assert_array_equal(getattr(plan, field.name), getattr(plans[0], field.name))


@pytest.mark.parametrize("spare", [3, 8])
def test_other_experts_than_recorded_are_still_exact(ranks, spare):
    expected = None
    for gradients, differing, alone in ranks(2).run(differing_routes, Case(), 3, spare):
        assert differing == 3 * 2  # on each of the two ranks
        assert worst_error(gradients, alone) <= 1e-12
        expected = gradients if expected is None else expected
        assert all(np.array_equal(gradients[name], expected[name]) for name in expected)
