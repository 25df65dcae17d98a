"""A batch whose record is shifted, or another model's: noticed in its first micro-batch, and all ranks stop."""

import re
from functools import partial

import pytest
from ep_shift import shift_of

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.planner.errors import InputError


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("record", ["token", "layer", "model"])
def test_a_record_of_something_else_is_refused(ranks, record, scoring):
    for kind, message, share, done in ranks(2).run(partial(shift_of, scoring=scoring), record, "refuse"):
        assert kind == "InputError" and done == 1
        assert share < 0.5
        assert re.search(
            r"the trace agrees .* on \d+% of .* \(layer 0: \d+%, layer 1: \d+%; .*(one token|layer late|of another)",
            message,
        )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_rank_with_a_wrong_record_stops_all(ranks, micro_batches):
    right, wrong = ranks(2).run(partial(shift_of, wrong_rank=1, micro_batches=micro_batches), "token", "refuse")
    assert "the trace agrees" in wrong[1] and wrong[3] == 1
    assert right[0] == "InputError" and "rank 1 stopped" in right[1] and right[3] == 1


@pytest.mark.parametrize("checkpoint", ["", "reentrant", "non-reentrant"])
def test_the_right_record_agrees(ranks, checkpoint):
    for kind, _, share, done in ranks(2).run(partial(shift_of, checkpoint=checkpoint), "right", "refuse"):
        assert (kind, share, done) == ("", 1.0, 2)


@pytest.mark.parametrize(
    ("record", "on_shift", "share_is_known"),
    [("token", "warn", True), ("token", "ignore", False), ("model", "ignore", False), ("model", None, True)],
)
def test_a_stale_record_may_be_trained_on(ranks, record, on_shift, share_is_known):
    """None refuses no record of a few tokens that is not shifted: it may be a trial's."""
    for kind, _, share, done in ranks(2).run(shift_of, record, on_shift):
        assert kind == "" and done == 2
        assert (share is not None) == share_is_known and (share is None or share < 0.5)


@pytest.mark.parametrize(
    ("record", "length"),
    [("token", 10), ("token", 40), ("token early", 10), ("layer", 10), ("layer", 40), ("layer early", 40)],
)
def test_a_shifted_record_is_refused_unasked(ranks, record, length):
    """However few tokens there are: that a record agrees one token or layer on is no accident."""
    for kind, message, share, done in ranks(2).run(partial(shift_of, length=length, layers=3), record, None):
        assert kind == "InputError" and done == 1 and share < 0.5, message
        said = record if record.endswith("early") else f"{record} late"
        assert f"98 to 100 % is usual): it is one {said}" in message


def test_a_long_record_is_refused_unasked(ranks):
    for kind, message, _, done in ranks(2).run(partial(shift_of, length=700), "model", None):
        assert kind == "InputError" and done == 1, message


def test_a_few_tokens_more_or_less_are_not_a_shift(ranks):
    """Between 50 and 90 %: a warning."""
    for kind, _, share, done in ranks(2).run(partial(shift_of, wrong=0.15), "token", "refuse"):
        assert kind == "" and done == 2 and 0.5 <= share < 0.9


def test_on_shift_is_checked():
    with pytest.raises(InputError, match="on_shift is 'never'"):
        RuntimeOptions(on_shift="never")
