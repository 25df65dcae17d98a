"""Places of tokens in packed, padded and dynamically sized micro-batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relibra_kernels.parallel import BatchLayout
from relibra_kernels.planner import InputError, RoutingTrace, ShapeError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 4))
def test_every_token_has_one_place(lengths, num_ranks):
    layout = BatchLayout.balanced(lengths, num_ranks, 64)
    micro_batch, rank, row = layout.place_of_token()
    assert len(row) == sum(lengths)
    for m in range(layout.num_micro_batches):
        for r in range(num_ranks):
            rows = row[(micro_batch == m) & (rank == r)]
            assert len(rows) <= 64
            np.testing.assert_array_equal(rows, layout.packed_rows(m, r))
            for left in (False, True):
                padded = layout.padded_rows(m, r, left=left)
                np.testing.assert_array_equal(padded[padded >= 0], rows)
                own = layout.lengths[layout.sequences(m, r)]
                assert len(padded) == len(own) * max(own, default=0)
    assert sorted(np.concatenate([layout.of_rank(r) for r in range(num_ranks)])) == list(range(len(lengths)))


def test_padding_by_hand():
    layout = BatchLayout(np.zeros(2, int), np.zeros(2, int), np.array([3, 1]), 1, 1)
    assert layout.padded_rows(0, 0, 4).tolist() == [0, 1, 2, -1, 3, -1, -1, -1]
    assert layout.padded_rows(0, 0, left=True).tolist() == [0, 1, 2, -1, -1, 3]


def test_loads_are_those_of_the_places():
    ids = np.array([[[0]], [[1]], [[1]], [[2]]], np.int8)
    trace = RoutingTrace(ids, np.array([0, 2, 3, 4]), 3, (0,))
    layout = BatchLayout(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([2, 1, 1]), 2, 2)
    assert layout.loads(trace)[0].tolist() == [[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: BatchLayout.balanced([9], 2, 8), InputError, "must hold the longest sequence, which has 9"),
        (
            lambda: BatchLayout(np.array([2]), np.array([0]), np.array([1]), 2, 1),
            InputError,
            "rank_of_sequence holds 2",
        ),
        (lambda: BatchLayout(np.array([0.5]), np.array([0]), np.array([1]), 2, 1), ShapeError, "is float64"),
        (
            lambda: BatchLayout(np.array([0]), np.array([0]), np.array([5]), 1, 1).padded_rows(0, 0, 4),
            InputError,
            "width is 4",
        ),
    ],
)
def test_refused(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
