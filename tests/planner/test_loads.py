"""Load tables against a plain count."""

import time
import tracemalloc

import numpy as np
import pytest

from relibra_kernels.planner import (
    ClusterSpec,
    InputError,
    RoutingTrace,
    ShapeError,
    check_loads,
    count_loads,
    load_table,
    plan_batch,
)


def make_trace(sequences=9, num_experts=16, layers=3, top_k=4, dtype=np.int8):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 40, sequences)
    ids = rng.random((lengths.sum(), layers, num_experts)).argsort(-1)[..., :top_k].astype(dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids[offsets[1:] - 1] = -1
    return RoutingTrace(ids, offsets, num_experts, tuple(range(layers)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_load_table_counts_what_was_recorded(dtype, monkeypatch):
    monkeypatch.setattr("relibra_kernels.planner.trace_rules._CHUNK", 100)  # several chunks a sequence
    trace = make_trace(dtype=dtype)
    rng = np.random.default_rng(2)
    micro_batch, rank = rng.integers(0, 4, 9), rng.integers(0, 2, 9)
    expected = np.zeros((3, 4, 2, 16), np.int64)
    for i in range(9):
        for row in trace.sequence(i):
            for layer in range(3):
                for expert in row[layer]:
                    if expert >= 0:
                        expected[layer, micro_batch[i], rank[i], expert] += 1
    table = load_table(trace, micro_batch, rank, 4, 2)
    assert table.dtype == np.int32
    np.testing.assert_array_equal(table, expected)
    np.testing.assert_array_equal(count_loads(trace, micro_batch, 4), expected.sum(2))


def test_count_loads_finds_the_number_of_micro_batches():
    trace = make_trace()
    assert count_loads(trace, np.arange(9) // 2).shape == (3, 5, 16)


def test_bad_groups_are_refused():
    trace = make_trace()
    with pytest.raises(ShapeError, match="micro_batch_of_sequence"):
        count_loads(trace, np.zeros(8, int))
    with pytest.raises(InputError, match="micro_batch_of_sequence"):
        count_loads(trace, np.full(9, 3), 3)
    with pytest.raises(InputError, match="rank_of_sequence"):
        load_table(trace, np.zeros(9, int), np.full(9, -1), 1, 2)
    with pytest.raises(ShapeError, match="rank_of_sequence is float64"):
        load_table(trace, np.zeros(9, int), np.zeros(9), 1, 2)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        (np.full((1, 1, 4), -1), "must not be negative"),
        (np.ones((1, 1, 4)), "float64"),
        (np.ones((1, 4), int), r"shape \(1, 4\)"),
        (np.ones((1, 0, 4), int), r"shape \(1, 0, 4\)"),
        (np.full((1, 1, 4), 1 << 31), "32 bits"),
        (np.ones((1, 1, 4), bool), "bool"),
    ],
)
def test_bad_loads_are_refused(loads, message):
    with pytest.raises(InputError, match=message):
        check_loads(loads)


def test_counting_does_not_copy_the_trace():
    trace = make_trace(sequences=300, num_experts=64, layers=24, top_k=8)
    tracemalloc.start()
    count_loads(trace, np.arange(300) // 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trace.expert_ids.nbytes > 1 << 20
    assert peak < 8 * trace.expert_ids.nbytes  # one copy in 64 bits
    assert peak < 6 << 20  # a few chunks, however long the trace is


def test_loading_and_counting_stay_cheap(tmp_path):
    """A fifth of what takes 100 million assignments 0.35 CPU seconds and 105 MB; twice that fails.

    CPU time is taken as a multiple of numpy's own count of as many ready keys in the same run, memory by tracemalloc.
    """
    tokens, layers, top_k, experts = 52_000, 48, 8, 128
    ids = (
        np.arange(tokens * layers, dtype=np.int64).reshape(tokens, layers, 1) * 7919 + 11 * np.arange(top_k)
    ) % experts
    trace = RoutingTrace(ids.astype(np.int8), np.linspace(0, tokens, 257).astype(np.int64), experts, range(layers))
    trace.save(tmp_path / "t.npz")
    groups = np.arange(256) // 16
    keys = (ids + np.arange(layers)[:, None] * experts).reshape(-1).astype(np.intp)
    expected = np.bincount(keys, minlength=layers * experts)

    def seconds(call):
        times = []
        for _ in range(5):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    def load_and_count():
        return count_loads(RoutingTrace.load(tmp_path / "t.npz"), groups, 16)

    np.testing.assert_array_equal(load_and_count().sum(1).reshape(-1), expected)
    ratio = seconds(load_and_count) / seconds(lambda: np.bincount(keys, minlength=layers * experts))
    assert ratio < 3.3, ratio  # it is 1.85
    tracemalloc.start()
    load_and_count()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * trace.compact_ids.nbytes + 8e6, peak


def test_wrong_types_are_refused_with_what_to_do():
    trace, loads = make_trace(), np.ones((1, 1, 4), int)
    with pytest.raises(InputError, match=r"loads is a RoutingTrace, .* count_loads\(trace"):
        plan_batch(trace, ClusterSpec(1, 2))
    with pytest.raises(InputError, match=r"RoutingTrace.load\('trace.npz'\)"):
        count_loads("trace.npz", np.zeros(1, int))
    with pytest.raises(InputError, match="trace is a ndarray"):
        count_loads(loads, np.zeros(1, int))
    with pytest.raises(InputError, match=r"loads is .loads\.npz., but must be an array"):
        plan_batch("loads.npz", ClusterSpec(1, 2))
    with pytest.raises(InputError, match=r"cluster is 2, but must be a ClusterSpec: ClusterSpec\("):
        plan_batch(loads, 2)
    with pytest.raises(InputError, match=r"options is 1\.0, but must be PlanOptions"):
        plan_batch(loads, ClusterSpec(1, 2), options=1.0)


def test_traces_and_plans_show_themselves_in_a_line_and_a_table():
    trace = make_trace()
    plan = plan_batch(count_loads(trace, np.zeros(9, int)), ClusterSpec(1, 2), model="<toy>")
    assert repr(trace).startswith("RoutingTrace(9 sequences, ") and "4 of 16 experts a token" in repr(trace)
    assert repr(plan).startswith("BatchPlan(3 layers, 1 micro-batches, 16 experts, 2 ranks, ")
    for shown in (trace, plan):
        assert "\n" not in repr(shown) and len(repr(shown)) < 200
        assert shown._repr_html_().count("<tr>") >= 5 and "<toy>" not in shown._repr_html_()
