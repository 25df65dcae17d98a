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
from relibra_kernels.parallel.tokens.one_hop import OneHop
from relibra_kernels.parallel.tokens.tables import HopSizes, Sizes
from relibra_kernels.parallel.tokens.transport import Transport
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


@pytest.mark.parametrize(("hops", "overlap"), [(1, False), (1, True), (2, False)])
def test_the_tables_of_all_layers_are_one_launch_a_layer_at_most(monkeypatch, hops, overlap):
    """Two with two hops. Of what is sent, arrives and is handed on in 94 layers, 64 ranks and 4,096 tokens, on the meta
    device: torch's operators that are no views, and kernels."""
    pytest.importorskip("triton", reason="kernels are launched")
    from relibra_kernels.kernels import schedule

    ranks, experts, top_k, tokens = 64, 128, 8, 4096
    kernels: list[str] = []
    monkeypatch.setattr(schedule, "launch", lambda kernel, *_, **__: kernels.append(str(kernel)))

    def launches(layers: int) -> int:
        def table(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(layers, *shape, dtype=dtype, device="meta")

        ids = table(torch.int64, tokens, top_k)
        split, slots = table(torch.int32, experts, ranks), table(torch.int16, experts, ranks)
        transport, sizes = far_away(hops, ranks, tokens, top_k)
        kernels.clear()
        with OperatorsThatLaunch() as counted:
            tables = transport.tables(planned_destinations(ids, split, slots, tokens * top_k))
            transport.arrivals(tables, [sizes] * layers, 4, overlap, "a micro-batch")
        assert len(kernels) == 3
        return counted.launches + len(kernels)

    assert 40 < launches(2) == launches(94) <= 94 * hops


def far_away(hops: int, ranks: int, tokens: int, top_k: int) -> tuple[Transport, Sizes]:
    """The transport of a rank on 8 nodes whose exchanges bring nothing; a layer's sizes, alike for all ranks."""

    def comm(size: int) -> SimpleNamespace:
        arriving = SimpleNamespace(wait=lambda: None)
        return SimpleNamespace(size=size, rank=0, start=lambda *_: arriving)

    def all_alike(size: int, rows: int) -> HopSizes:
        return HopSizes([rows // size] * size, [rows // size] * size)

    rows, per_node, assignments = 7 * tokens, ranks // 8, tokens * top_k
    parts = assignments // ranks, assignments - assignments // ranks
    if hops == 1:
        return OneHop(comm(ranks), comm(ranks)), Sizes((all_alike(ranks, rows),), top_k, parts)
    inside = all_alike(per_node, rows // 8), all_alike(per_node, rows - rows // 8)
    return TwoHops(comm(8), comm(per_node), comm(ranks), 4), Sizes((all_alike(8, rows), *inside), top_k, parts)
