"""What a layer costs beside its arithmetic, counted: exchanges, and calls that make the host wait for the device."""

from dataclasses import replace

import pytest
from ep_counted import blocking_calls_are_seen, count_in_layers
from toy_training import Case

from relibra_kernels.parallel import RuntimeOptions

FETCHING = Case(plan="shuffled", options=RuntimeOptions(kept_bytes=0))


@pytest.mark.parametrize(
    ("case", "exchanges"),
    [
        (Case(plan="static"), 4),
        (Case(plan="shuffled"), 4),  # kept replicas cost none
        (FETCHING, 7),
        (replace(FETCHING, padding=2), 7),
        (replace(FETCHING, options=RuntimeOptions(kept_bytes=0, keep_replicas=True)), 6),
    ],
    ids=["no replicas", "kept", "fetched", "fetched, padded", "fetched once"],
)
def test_exchanges_and_waits_of_a_layer(ranks, case, exchanges):
    for collectives, blocking, runs, fetched in ranks(2).run(count_in_layers, case):
        assert (fetched > 0) == (exchanges > 4)
        assert collectives == {"all_to_all_single": exchanges * runs}
        assert not blocking


def test_a_live_layer_waits_for_its_counts(ranks):
    """Once in forward; so the counter sees what it is to see."""
    for blocking in ranks(2).run(blocking_calls_are_seen):
        assert blocking["cpu in live.py"] == 2 * 2
