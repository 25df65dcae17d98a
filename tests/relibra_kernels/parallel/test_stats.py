"""What a batch reports; and tokens that chose other experts than were recorded: counted, and still exact."""

import json
import time
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from ep_stats import differing_routes, planned_elsewhere, stats_of_batch
from ranks import Ranks
from toy_training import Case, make_batch
from training_checks import worst_error

from relibra_kernels.parallel import BatchStats, RuntimeOptions
from relibra_kernels.parallel.comm.ledger import Ledger
from relibra_kernels.parallel.session import Session
from relibra_kernels.planner import BatchPlan, InputError


@pytest.mark.parametrize("unrecorded", [0.0, 0.1])
def test_stats_of_a_batch(ranks, unrecorded):
    case = Case(plan="planned", unrecorded=unrecorded, sequence_lengths=(12,) * 8)
    results = ranks(2).run(stats_of_batch, case)
    recorded = int((make_batch(case, 0)[0].expert_ids >= 0).sum())
    computed = np.array([counts for *_, counts in results])  # [ranks, micro-batches * layers]
    assert computed.shape == (2, 2 * 2) and computed.min() > 0
    static = static_max_mean(case)
    for rank, (stats, line, ranges, _) in enumerate(results):
        assert json.loads(line) == asdict(stats) and "\n" not in line
        assert stats.rank == rank and stats.layers_run == 2 * 2
        assert stats.planned_max_mean >= 1 and stats.differing_tokens == 0
        assert stats.actual_max_mean == pytest.approx((computed.max(0) / computed.mean(0)).mean(), rel=1e-12)
        assert stats.static_max_mean == pytest.approx(static, rel=1e-12)
        assert computed.sum() - stats.unknown_tokens * case.layers * case.top_k == recorded
        assert (stats.unknown_tokens > 0) == (unrecorded > 0)
        if not unrecorded:  # the plan does not know what unrecorded tokens choose
            assert stats.actual_max_mean == pytest.approx(stats.planned_max_mean)
        assert min(stats.dispatch_seconds, stats.compute_seconds, stats.combine_seconds, stats.tables_seconds) > 0
        assert (stats.live_seconds > 0) == (unrecorded > 0)
        assert stats.token_fast_bytes > 0 and stats.token_slow_bytes == 0
        assert {"relibra::dispatch", "relibra::compute", "relibra::combine"} <= set(ranges)
    every = [stats for stats, *_ in results]
    longer = np.mean([each.compute_seconds for each in every]) * (static - every[0].actual_max_mean)
    spent = np.mean([each.replica_seconds + each.migration_seconds for each in every])
    for stats in every:
        assert stats.saved_seconds == pytest.approx(longer - spent, abs=1e-8)


def static_max_mean(case):
    """From the recorded ids alone: contiguous homes, two ranks, no replicas."""
    trace, groups, _ = make_batch(case, 0)
    ratios = []
    for m in range(case.micro_batches):
        ids_TLK = np.concatenate([trace.sequence(i) for i in np.flatnonzero(groups == m)])
        for layer in range(case.layers):
            ids = ids_TLK[:, layer]
            second = (ids >= case.experts // 2).sum() / (ids >= 0).sum()
            ratios.append(2 * max(second, 1 - second))
    return np.mean(ratios)


def test_what_is_known_is_what_loggers_get():
    nothing = dict.fromkeys((field.name for field in fields(BatchStats)), 0)
    stats = BatchStats(**nothing | {"static_max_mean": None, "saved_seconds": None, "compute_seconds": 0.5})
    scalars = stats.scalars()
    assert scalars["compute_seconds"] == 0.5 and not {"static_max_mean", "saved_seconds"} & scalars.keys()
    assert len(scalars) == len(nothing) - 2 and all(isinstance(value, int | float) for value in scalars.values())


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


def test_layers_are_timed_in_some_passes_and_stand_for_all():
    ledger, cpu = Ledger(), torch.device("cpu")
    for timed in (False, True, False, False):
        ledger.begin_pass(timed)
        with ledger.layer_span("compute", cpu, timed):
            time.sleep(0.01)
    with ledger.span("tables", cpu):
        time.sleep(0.01)
    seconds = ledger.seconds()
    assert 0.04 <= seconds["compute"] < 0.2 and 0.01 <= seconds["tables"] < 0.04
    assert ledger.layer_span("compute", cpu, False) is ledger.layer_span("combine", cpu, False)  # nothing is made
    ledger.begin_batch()
    assert not ledger.layers_timed and set(ledger.seconds().values()) == {0.0}


@pytest.mark.parametrize(
    ("every", "count", "timed"), [(8, 1, [0]), (8, 2, [1]), (8, 20, [4, 12]), (1, 3, [0, 1, 2]), (0, 3, [])]
)
def test_which_micro_batches_are_timed(every, count, timed):
    session = Session(RuntimeOptions(timed_every=every), Ledger())
    assert [m for m in range(count) if session.times(m, count)] == timed


def test_a_negative_share_is_refused():
    with pytest.raises(InputError, match="timed_every is -1"):
        RuntimeOptions(timed_every=-1)
