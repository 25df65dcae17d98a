"""What a layer costs beside its arithmetic, counted: exchanges, and calls that make the host wait for the device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ep_counted import (
    OperatorsThatLaunch,
    blocking_calls_are_seen,
    count_in_layers,
    groups_connected_by_the_constructor,
)
from toy_training import Case

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.tokens.destinations import planned_destinations
from relibra_kernels.parallel.tokens.tables import send_tables
from relibra_kernels.parallel.tokens.two_hops import TwoHops

FETCHING = Case(plan="fetched")
TWO_NODES = Case(ranks=4, gpus_per_node=2, plan="static", options=RuntimeOptions(transport="two"))
TWO_FETCHING = replace(TWO_NODES, plan="fetched")


@pytest.mark.parametrize(
    ("case", "exchanges"),
    [
        (Case(plan="static"), 4),
        (Case(plan="shuffled"), 4),  # kept replicas cost none
        (FETCHING, 7),
        (replace(FETCHING, padding=2), 7),
        (replace(FETCHING, options=RuntimeOptions(keep_replicas=True)), 6),
    ],
    ids=["no replicas", "kept", "fetched", "fetched, padded", "fetched once"],
)
def test_exchanges_and_waits_of_a_layer(ranks, case, exchanges):
    for collectives, blocking, runs, fetched in ranks(2).run(count_in_layers, case):
        assert (fetched > 0) == (exchanges > 4)
        assert collectives == {"all_to_all_single": exchanges * runs}
        assert not blocking


@pytest.mark.parametrize(
    ("case", "exchanges"),
    [
        (TWO_NODES, 8),  # four between nodes and four inside them
        (replace(TWO_NODES, plan="shuffled", padding=2), 8),
        (TWO_FETCHING, 11),
        (
            replace(TWO_NODES, options=RuntimeOptions(transport="two", overlap=True)),
            12,
        ),  # own tokens are handed on apart
    ],
    ids=["no replicas", "kept, padded", "fetched", "overlap"],
)
def test_exchanges_and_waits_of_a_layer_with_two_hops(ranks, case, exchanges):
    for collectives, blocking, runs, fetched in ranks(4).run(count_in_layers, case):
        assert (fetched > 0) == (exchanges == 11)
        assert collectives == {"all_to_all_single": exchanges * runs}
        assert not blocking


@pytest.mark.parametrize(("case", "groups"), [(Case(plan="static"), 2), (TWO_NODES, 4)], ids=["one hop", "two hops"])
def test_ranks_are_connected_before_the_first_layer(ranks, case, groups):
    """Of the experts and beside them; and of the node and the rail."""
    assert ranks(case.ranks).run(groups_connected_by_the_constructor, case) == [(groups, True)] * case.ranks


def test_a_live_layer_waits_for_its_counts(ranks):
    """Once in forward; so the counter sees what it is to see."""
    for blocking in ranks(2).run(blocking_calls_are_seen):
        assert blocking["cpu in live.py"] == 2 * 2


@pytest.mark.parametrize("hops", [1, 2])
def test_the_tables_of_all_layers_are_one_launch_a_layer_at_most(hops):
    """Of 94 layers, 64 ranks and 4,096 tokens; torch's operators that are no views, on the meta device."""
    ranks, experts, top_k, tokens = 64, 128, 8, 4096

    def launches(layers: int) -> int:
        def table(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(layers, *shape, dtype=dtype, device="meta")

        ids = table(torch.int64, tokens, top_k)
        split, slots = table(torch.int32, experts, ranks), table(torch.int16, experts, ranks)
        with OperatorsThatLaunch() as counted:
            destinations = planned_destinations(ids, split, slots, tokens * top_k)
            if hops == 1:
                send_tables(destinations, ranks, 0)
            else:
                rail, node = SimpleNamespace(size=8, rank=0), SimpleNamespace(size=8, rank=0)
                TwoHops(rail, node, SimpleNamespace(), 4).tables(destinations)
        return counted.launches

    assert 30 < launches(2) == launches(94) <= 94
