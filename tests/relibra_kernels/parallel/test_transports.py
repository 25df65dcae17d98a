"""What a transport does, without the layer around it, on 64 ranks as 8 nodes, which are threads here; its choice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ep_transports import forwards_under_a_recorder, transports_that_differ
from local_ranks import Network, make_local, on_all_ranks
from ranks import one_rank
from tolerance import relative_error
from toy_training import Case

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.comm.groups import Groups
from relibra_kernels.parallel.tokens.chunks import Chunk
from relibra_kernels.parallel.tokens.destinations import Destinations
from relibra_kernels.parallel.tokens.transport import exchange_messages
from relibra_kernels.parallel.tokens.two_hops import TwoHops
from relibra_kernels.parallel.transports import chosen_transport
from relibra_kernels.payload import PayloadLayout
from relibra_kernels.planner import ClusterSpec, InputError
from relibra_kernels.planner.pricing.models import shape_of_sizes

RANKS, PER_NODE, EXPERTS, TOP_K, TOKENS, HIDDEN = 64, 8, 128, 8, 48, 16
SLOTS = EXPERTS // RANKS
ROW = PayloadLayout(HIDDEN, TOP_K, torch.float64, torch.float64).row_bytes
BACK = PayloadLayout(HIDDEN, TOP_K, torch.float64, torch.float64, has_slots=False).row_bytes


def routed(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(expert ids, -1 for every fifth token; hidden states; gate weights) of a rank's tokens."""
    random = torch.Generator().manual_seed(rank)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP_K).indices
    ids_TK[::5] = -1
    x_TH = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    return ids_TK, x_TH, torch.rand(TOKENS, TOP_K, generator=random, dtype=torch.float64)


def factors(rank: int, chunk: Chunk) -> torch.Tensor:
    """Of each place of each row: 1 + its expert, 0 where the place is empty. An expert multiplies its rows by it."""
    schedule = chunk.group.schedule
    slot = torch.repeat_interleave(torch.arange(SLOTS), schedule.slot_offsets.diff().long())
    factor = torch.zeros(chunk.weights.numel(), dtype=torch.float64)
    factor[schedule.assignment_of[: len(slot)].long()] = (1.0 + rank * SLOTS + slot).double()
    return factor.view_as(chunk.weights)


def there_and_back(name: str, overlap: bool, live: bool = False) -> tuple[Network, list[tuple]]:
    """One layer on all ranks, forward and backward: of a recorded micro-batch, or live."""
    network = Network(PER_NODE)

    def layer(rank: int) -> tuple:
        transport = make_local(name, network, RANKS, rank, SLOTS)
        ids, x, gates = routed(rank)
        rank_TK = torch.where(ids >= 0, ids // SLOTS, -1)
        slot_TK = torch.where(ids >= 0, ids % SLOTS, -1).to(torch.int16)
        tables = transport.tables(Destinations(rank_TK[None], slot_TK[None]))
        counts = tables.counts.numpy()
        sizes = transport.sizes(counts, exchange_messages(transport.host, transport.messages(counts), "counts"))
        come = [None] if live else transport.arrivals(tables, sizes, SLOTS, overlap, "a micro-batch")
        path = transport.path(tables.of_layers([sizes[0].hops[0]])[0], sizes[0], SLOTS, "here", overlap, come[0])
        chunks = [arrive() for arrive in path.dispatch(x, gates, "dispatch")]
        parts = [((factors(rank, c) * c.weights).sum(1, keepdim=True) * c.x, factors(rank, c)) for c in chunks]
        for index, (rows, _) in enumerate(parts):
            path.room(index, HIDDEN, rows.dtype).copy_(rows)
        out = path.combine("combine")
        returned = []
        for (_, factor), arrive, chunk in zip(parts, path.dispatch_rows(x, "backward dispatch"), chunks, strict=True):
            rows = arrive().clone()
            assert torch.equal(rows, chunk.x)
            returned.append((rows, chunk.group.spread(factor)))
        dx, dgates = path.combine_gradients(returned, "backward combine", torch.float64)
        return out, dx, dgates, path.assignments

    return network, on_all_ranks(RANKS, layer)


@pytest.fixture(scope="module")
def runs():
    return {case: there_and_back(*case) for case in (("one", False), ("two", False), ("one", True), ("two", True))}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["one", "two"])
def test_every_choice_is_computed_once_and_comes_back(runs, name, overlap):
    _, results = runs[name, overlap]
    computed = 0
    for rank, (out, dx, dgates, assignments) in enumerate(results):
        ids, x, gates = routed(rank)
        factor = torch.where(ids >= 0, 1.0 + ids, 0.0).double()
        visited = torch.tensor([len({*(row // SLOTS).tolist()} - {-1}) for row in ids], dtype=torch.float64)
        assert relative_error(out, (factor * gates).sum(1, keepdim=True) * x) <= 1e-12
        assert relative_error(dx, visited[:, None] * x) <= 1e-12
        assert torch.equal(dgates, factor)
        computed += assignments
    assert computed == sum(int((routed(rank)[0] >= 0).sum()) for rank in range(RANKS))


@pytest.mark.parametrize(("name", "overlap"), [("one", True), ("two", False), ("two", True)])
def test_the_same_bits_twice(runs, name, overlap):
    """Also where tables of what arrives are made in the layer, of the slots that came with the rows."""
    again = there_and_back(name, overlap, live=True)[1]
    for first, second in zip(runs[name, overlap][1], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def crossings(ranks_together: int) -> np.ndarray:
    """int64 [R, N]: tokens of each rank that cross to each node, once for every rank or node that they visit there."""
    node_of = np.arange(RANKS) // PER_NODE
    rows = np.zeros((RANKS, RANKS // PER_NODE), np.int64)
    for rank in range(RANKS):
        owner = np.where(routed(rank)[0].numpy() >= 0, routed(rank)[0].numpy() // SLOTS // ranks_together, -1)
        visited = np.bincount([node for row in owner for node in {*row} - {-1}], minlength=RANKS // ranks_together)
        np.add.at(rows[rank], np.arange(len(visited)) * ranks_together // PER_NODE, visited)
        rows[rank, node_of[rank]] = 0
    return rows


@pytest.mark.parametrize("overlap", [False, True])
def test_bytes_between_nodes(runs, overlap):
    """Top-8 over 8 nodes of 8: two hops cross at most 0.72 times as often, to the byte what the routing says."""
    expected = {"one": crossings(1), "two": crossings(PER_NODE)}
    assert expected["two"].sum() <= 0.72 * expected["one"].sum()
    sizes = {"dispatch": ROW, "combine": 8 * HIDDEN, "backward dispatch": 8 * HIDDEN, "backward combine": BACK}
    total = {}
    for name, rows_RN in expected.items():
        network = runs[name, overlap][0]
        for kind, size in sizes.items():
            out = kind.endswith("dispatch")
            for rank in range(RANKS):
                counter = network.sent if out else network.got
                assert counter[rank, kind, "slow"] == rows_RN[rank].sum() * size
        for counter in (network.sent, network.got):
            total[name, counter is network.sent] = sum(
                n for key, n in counter.items() if key[2] == "slow" and key[1] in sizes
            )
    for direction in (False, True):
        assert total["two", direction] <= 0.72 * total["one", direction]


def test_a_token_crosses_on_its_rail(runs):
    """Rows that come from other nodes come to the rank of the sender's place; so a rail is as busy as its tokens."""
    network = runs["two", False][0]
    for place in range(PER_NODE):
        rail = range(place, RANKS, PER_NODE)
        for kind in ("dispatch", "backward combine"):
            sent, got = (sum(c[rank, kind, "slow"] for rank in rail) for c in (network.sent, network.got))
            assert sent == got > 0


def test_only_so_many_slots_fit_into_a_number():
    node = SimpleNamespace(size=128)
    with pytest.raises(InputError, match="128 ranks a node with 257 slots each"):
        TwoHops(None, node, None, 257)
    TwoHops(None, node, SimpleNamespace(), 256)


@pytest.mark.parametrize("wanted", ["one", "two", "auto"])
def test_one_node_needs_one_hop(wanted):
    with one_rank():
        groups = Groups(None, ClusterSpec(1, 1))
        assert chosen_transport(wanted, groups, ClusterSpec(1, 1), shape_of_sizes(16, 8, 4, 2)) == "one"


def test_names():
    with pytest.raises(InputError, match="transport is 'three'; it must be one of one, two, auto"):
        RuntimeOptions(transport="three")


def test_ranks_that_want_different_transports_are_told_so(ranks):
    for error in ranks(4).run(transports_that_differ):
        assert error == "RuntimeOptions.transport of rank 3 differs from rank 0's; every rank needs the same"


def test_a_layer_asks_its_transport_for_nothing_else(ranks):
    """Tables of all layers once; then, in each layer, out and back, and the same backwards."""
    case = Case(ranks=4, gpus_per_node=2, plan="static", micro_batches=1, options=RuntimeOptions(transport="two"))
    opening = [(name, "", -1) for name in ("tables", "messages", "sizes", "arrivals", *["path"] * case.layers)]
    forward = [[("dispatch", "dispatch", i), ("combine", "combine", i)] for i in range(case.layers)]
    backward = [
        [("dispatch_rows", "backward dispatch", i), ("combine_gradients", "backward combine", i)]
        for i in reversed(range(case.layers))
    ]
    for calls in ranks(4).run(forwards_under_a_recorder, case):
        assert calls == opening + [call for of_layer in forward + backward for call in of_layer]


def test_the_choice_on_a_machine_without_a_fast_network(ranks):
    """On gloo nodes are as near as ranks, and one hop has fewer launches."""
    assert ranks(4).run(forwards_under_a_recorder, Case(ranks=4, gpus_per_node=2), True) == ["one"] * 4
