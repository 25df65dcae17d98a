"""Routed batches: which rank and micro-batch has every token, packed, padded and dynamically sized."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relibra_kernels.parallel import RoutedBatch
from relibra_kernels.parallel.routed_batch import routed_batch
from relibra_kernels.planner import InputError, RoutingTrace, ShapeError


def trace_of(lengths) -> RoutingTrace:
    """Sequences of so many tokens; token i chose expert i % 3."""
    ids = (np.arange(sum(lengths)) % 3).astype(np.int8)[:, None, None]
    return RoutingTrace(ids, np.concatenate([[0], np.cumsum(lengths)]), 3, (0,))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 4))
def test_every_sequence_has_one_place(lengths, num_ranks):
    batch = RoutedBatch.from_token_budget(trace_of(lengths), num_ranks, 64)
    placed = []
    for m in range(batch.num_micro_batches):
        for r in range(num_ranks):
            placed += batch.sequences(m, r).tolist()
            own = batch.lengths[batch.sequences(m, r)]
            assert own.sum() <= 64
            for left in (False, True):
                padded = batch.padded_rows(m, r, left=left)
                np.testing.assert_array_equal(padded[padded >= 0], np.arange(own.sum()))
                assert len(padded) == len(own) * max(own, default=0)
    assert sorted(placed) == list(range(len(lengths)))
    parts = [batch.of_rank(r) for r in range(num_ranks)]
    assert sum(part.trace.num_sequences for part in parts) == len(lengths)
    np.testing.assert_array_equal(batch.loads(), np.concatenate([part.loads() for part in parts], 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=12), st.randoms())
def test_sequences_train_in_the_order_in_which_they_were_dealt(lengths, random):
    trace, order = trace_of(lengths), list(range(len(lengths)))
    random.shuffle(order)
    dealt = [[order[0:1], order[1:3]], [order[3:4], order[4:]]]
    batch = RoutedBatch.from_micro_batches(trace, dealt)
    for r, m in np.ndindex(2, 2):
        assert batch.sequences(m, r).tolist() == dealt[r][m]
        part = batch.of_rank(r)
        own = part.trace.select(part.sequences(m)).expert_ids
        np.testing.assert_array_equal(own, trace.select(dealt[r][m]).expert_ids)


def test_as_slime_and_verl_deal_out():
    trace = trace_of([1, 2, 3, 4, 5, 6, 7, 8])
    verl = RoutedBatch.from_verl(trace, 2, 2)
    assert [[verl.sequences(m, r).tolist() for m in range(2)] for r in range(2)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    slime = RoutedBatch.from_slime(trace, [[0, 2, 4, 6], [1, 3, 5, 7]], [[[3], [0, 1, 2]], [[0, 1], [2, 3]]])
    assert [[slime.sequences(m, r).tolist() for m in range(2)] for r in range(2)] == [
        [[6], [0, 2, 4]],
        [[1, 3], [5, 7]],
    ]


def test_padding_by_hand():
    batch = RoutedBatch(trace_of([3, 1]), np.zeros(2, int), 1)
    assert batch.padded_rows(0, 0, 4).tolist() == [0, 1, 2, -1, 3, -1, -1, -1]
    assert batch.padded_rows(0, 0, left=True).tolist() == [0, 1, 2, -1, -1, 3]


def test_loads_are_those_of_the_places():
    ids = np.array([[[0]], [[1]], [[1]], [[2]]], np.int8)
    trace = RoutingTrace(ids, np.array([0, 2, 3, 4]), 3, (0,))
    batch = RoutedBatch(trace, np.array([0, 0, 1]), 2, rank_of_sequence=np.array([0, 1, 1]), num_ranks=2)
    assert batch.loads()[0].tolist() == [[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]


ONE = trace_of([1])
TWO = RoutedBatch.from_verl(trace_of([1, 1]), 2, 1)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (
            lambda: RoutedBatch.from_token_budget(trace_of([9]), 2, 8),
            InputError,
            "must hold the longest sequence, which has 9",
        ),
        (
            lambda: RoutedBatch(ONE, np.array([0]), 1, rank_of_sequence=np.array([2]), num_ranks=2),
            InputError,
            "rank_of_sequence holds 2..2; it must lie in 0..1",
        ),
        (lambda: RoutedBatch(ONE, np.array([0.5]), 1), ShapeError, "micro_batch_of_sequence is float64"),
        (lambda: RoutedBatch(ONE, np.array([1]), 1), InputError, "micro_batch_of_sequence holds 1..1"),
        (lambda: RoutedBatch(ONE, np.array([0]), 0), InputError, "num_micro_batches is 0"),
        (lambda: RoutedBatch(ONE, np.array([0]), 1, rows=[None, None]), InputError, "rows are for 2 micro-batches"),
        (lambda: RoutedBatch(trace_of([1, 1]), np.zeros(2, int), 1, order=np.zeros(2, int)), InputError, "order names"),
        (lambda: RoutedBatch(trace_of([5]), np.array([0]), 1).padded_rows(0, 0, 4), InputError, "width is 4"),
        (lambda: TWO.of_rank(2), InputError, "rank is 2; the batch is for the ranks 0..1"),
        (lambda: routed_batch(TWO, None, None, 0, 3), InputError, "for 2 ranks; the group has 3"),
        (lambda: routed_batch(TWO, np.zeros(2), None, 0, 2), InputError, "give it alone"),
        (lambda: routed_batch(ONE, None, 1, 0, 1), InputError, "micro_batch_of_sequence or num_micro_batches is None"),
        (lambda: routed_batch([1], None, None, 0, 1), InputError, "batch is a list"),
        (
            lambda: RoutedBatch.from_slime(ONE, [[0]], [[[0]], [[0]]]),
            InputError,
            "partition_of_rank is for 1 ranks and micro_batch_indices_of_rank for 2",
        ),
    ],
)
def test_refused(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
