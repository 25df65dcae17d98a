"""The Megatron adapter: its maps against the plan, and against megatron-core itself where that is installed."""

import importlib.util
import os
import types

import numpy as np
import pytest
import torch

from relibra_kernels.integrations import megatron
from relibra_kernels.integrations.megatron_shares import TokenShare
from relibra_kernels.planner import (
    ClusterSpec,
    PlanOptions,
    RoutingTrace,
    from_megatron,
    load_table,
    plan_batch,
)
from relibra_kernels.planner.errors import InputError, ShapeError

E, K, L, R, M = 8, 2, 2, 2, 2
HAS_MEGATRON = os.environ.get("RELIBRA_MEGATRON") == "required" or (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None
)
needs_megatron = pytest.mark.skipif(not HAS_MEGATRON, reason="megatron-core is not installed")


def make_batch(last_unknown=False):
    """(trace of all ranks, micro-batch and rank of each sequence, loads, a plan with replicas and moved experts)"""
    random = np.random.default_rng(0)
    lengths = [5, 9, 7, 4, 6, 8, 3, 9]
    popularity = random.lognormal(0, 1.2, (L, E))
    keys = random.random((sum(lengths), L, E)) ** (1 / popularity)
    ids = keys.argsort(-1)[..., ::-1][..., :K].astype(np.int8)
    offsets = np.cumsum([0, *lengths])
    if last_unknown:
        ids[offsets[1:] - 1] = -1
    trace = RoutingTrace(ids, offsets, E, tuple(range(L)))
    groups, rank = np.arange(8) // 4, np.arange(8) % R
    loads = load_table(trace, groups, rank, M, R)
    dealt = np.tile(np.arange(E) % R, (L, 1))  # homes that are not the contiguous ones
    plan = plan_batch(loads, ClusterSpec(1, R, 2), previous_home=dealt, options=PlanOptions(balance=1.0))
    assert (plan.replicas >= 0).any() and (plan.home != np.arange(E) // (E // R)).any()
    return trace, groups, rank, loads, plan


def of_rank(trace, groups, rank, m, r):
    return trace.select(np.flatnonzero((groups == m) & (rank == r)))


def test_places_are_a_permutation_and_replicas_follow():
    *_, plan = make_batch()
    for layer in range(L):
        order, places = megatron.expert_of_place(plan, layer), megatron.place_of_expert(plan, layer)
        assert order.shape == (R, E // R)
        assert (order.reshape(-1)[places] == np.arange(E)).all()
        assert (plan.home[layer][order] == np.arange(R)[:, None]).all()
        with_replicas = megatron.expert_of_place(plan, layer, 1)
        np.testing.assert_array_equal(with_replicas[:, E // R :], plan.replicas[layer, 1])


def test_every_assignment_goes_to_a_place_of_its_expert_and_ranks_are_balanced():
    trace, groups, rank, loads, plan = make_batch(last_unknown=True)
    for layer in range(L):
        for m in range(M):
            places = megatron.expert_of_place(plan, layer, m)
            counts = np.zeros(places.size, int)
            for r in range(R):
                ids = of_rank(trace, groups, rank, m, r).expert_ids[:, layer]
                column = megatron.places_of_assignments(plan, loads, ids, layer, m, r)
                assert (column[ids < 0] == -1).all()
                np.testing.assert_array_equal(places.reshape(-1)[column[ids >= 0]], ids[ids >= 0])
                counts += np.bincount(column[ids >= 0], minlength=places.size)
            np.testing.assert_array_equal(counts.reshape(places.shape).sum(1), plan.rank_loads(loads)[layer, m])
            np.testing.assert_array_equal(counts.reshape(places.shape)[:, E // R :], plan.quota[layer, m])


def test_probs_keep_their_gradients_on_the_way_to_places():
    probs = torch.rand(3, 4, requires_grad=True)
    ids, places = torch.tensor([[1, 3], [0, 2], [-1, -1]]), torch.tensor([[5, 0], [2, 4], [-1, -1]])
    by_place, routing_map = megatron.to_places(probs, ids, places, 6)
    assert routing_map.nonzero().tolist() == [[0, 0], [0, 5], [1, 2], [1, 4]]
    assert by_place[0, 5] == probs[0, 1] and by_place[1, 4] == probs[1, 2] and not by_place[2].any()
    by_place.sum().backward()
    assert probs.grad.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_targets_fill_what_has_no_loss_and_refuse_the_rest():
    trace, groups, rank, _, _ = make_batch(last_unknown=True)
    part = of_rank(trace, groups, rank, 0, 1)  # sequences of 9 and 4 tokens
    targets = megatron.replay_targets(part, first_expert=4)
    assert len(targets) == L and all(t.dtype == torch.int64 and t.shape == (13, K) for t in targets)
    known = ~part.unknown
    np.testing.assert_array_equal(targets[1][known], part.expert_ids[known, 1])
    assert targets[0][[8, 12]].tolist() == [[4, 5], [4, 5]]
    rows = TokenShare().padded_rows(part, 10)
    assert rows[:6].tolist() == [0, 9, 1, 10, 2, 11] and (rows == -1).sum() == 7
    padded = megatron.replay_targets(part, rows=rows, layers=[1])
    np.testing.assert_array_equal(padded[0].reshape(10, 2, K)[:8, 0], part.sequence(0)[:8, 1])
    np.testing.assert_array_equal(padded[0].reshape(10, 2, K)[:3, 1], part.sequence(1)[:3, 1])
    assert padded[0].sort(1).values.diff(dim=1).ne(0).all()  # no expert twice, which Megatron would not notice
    for bad, message in (
        ({"rows": np.arange(12)[1:]}, "trace row 0 0 times"),
        ({"rows": np.append(np.arange(13), 3)}, "trace row 3 2 times"),
        ({"rows": np.arange(14)}, r"-1\.\.12"),
        ({"layers": [2]}, r"layers 0\.\.1"),
    ):
        with pytest.raises((InputError, ShapeError), match=message):
            megatron.replay_targets(part, **bad)
    ids = part.expert_ids.copy()
    ids[3] = -1
    with pytest.raises(InputError, match="not the last"):
        megatron.replay_targets(RoutingTrace(ids, part.offsets, E, part.moe_layer_ids))
    with pytest.raises(InputError, match="sequence_length is 8"):
        TokenShare().padded_rows(part, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_router_fusion": True}, "moe_router_fusion is True"),
        ({"moe_enable_routing_replay": False}, "moe_enable_routing_replay is False"),
        ({"moe_expert_capacity_factor": 1.5}, "moe_expert_capacity_factor is 1.5"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
    ],
)
def test_configs_that_do_not_replay_are_refused(change, message):
    good = {"moe_router_fusion": False, "moe_enable_routing_replay": True, "moe_expert_capacity_factor": None}
    megatron.check_config(types.SimpleNamespace(**good))
    with pytest.raises(InputError, match=message):
        megatron.check_config(types.SimpleNamespace(**{**good, **change}))


@pytest.fixture
def core():
    """megatron-core on the CPU: a config, and groups of one rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from megatron.core.transformer.transformer_config import TransformerConfig

    def config(experts=E):
        return TransformerConfig(
            num_layers=L,
            hidden_size=16,
            num_attention_heads=2,
            num_moe_experts=experts,
            moe_router_topk=K,
            moe_enable_routing_replay=True,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="allgather",
            use_cpu_initialization=True,
            add_bias_linear=False,
        )

    groups = ProcessGroupCollection()
    for name in ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "tp_ep"):
        setattr(groups, name, None)
    RouterReplay.clear_global_router_replay_instances()
    yield types.SimpleNamespace(config=config, groups=groups, RouterReplay=RouterReplay)
    RouterReplay.clear_global_router_replay_instances()


def make_routers(core):
    from megatron.core.transformer.moe.router import TopKRouter

    torch.manual_seed(0)
    return [TopKRouter(core.config(), core.groups) for _ in range(L)]


def routed(router, hidden):
    """Megatron's router without `forward`, which asks for a CUDA device."""
    logits = torch.nn.functional.linear(hidden, router.weight)
    return router.routing(logits[:, None])


@needs_megatron
def test_real_routers_replay_the_trace(core):
    trace, groups, rank, _, _ = make_batch(last_unknown=True)
    part = of_rank(trace, groups, rank, 0, 0)
    routers, hidden = make_routers(core), torch.randn(part.num_tokens, 16)
    megatron.check_config(core.config())
    live = [routed(router, hidden)[1] for router in routers]
    with megatron.replaying(megatron.replay_targets(part)):
        results = [routed(router, hidden) for router in routers]
    known = ~part.unknown
    for layer, (probs, routing_map) in enumerate(results):
        assert (routing_map.sum(1) == K).all()
        expected = np.sort(part.expert_ids[known, layer])
        np.testing.assert_array_equal(routing_map[torch.from_numpy(known)].nonzero()[:, 1].reshape(-1, K), expected)
        probs.square().sum().backward()
        assert routers[layer].weight.grad.any()
    assert all(routed(router, hidden)[1].equal(before) for router, before in zip(routers, live, strict=True))
    one = megatron.replaying(megatron.replay_targets(part, layers=[0]))
    with pytest.raises(InputError, match="targets are for 1 routers, but this stage has 2"), one:
        pass


@needs_megatron
def test_real_recordings_become_a_trace(core):
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    routers, hidden = make_routers(core), torch.randn(11, 16)
    core.RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    maps = [routed(router, hidden)[1] for router in routers]
    recorded = core.RouterReplay.get_recorded_data()
    trace = from_megatron([indices.numpy() for indices in recorded], E, sequence_lengths=[4, 7])
    for layer, routing_map in enumerate(maps):
        ids = torch.from_numpy(trace.expert_ids[:, layer].astype(np.int64))
        assert torch.zeros_like(routing_map).scatter(1, ids, True).equal(routing_map)
    core.RouterReplay.clear_global_router_replay_action()
    with megatron.replaying(megatron.replay_targets(trace)):
        assert all(routed(router, hidden)[1].equal(m) for router, m in zip(routers, maps, strict=True))


@needs_megatron
def test_real_dispatchers_compute_the_layer_under_a_plan(core):
    """Each rank's dispatcher gets the places of the plan; the ranks' parts add up to the layer without one."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

    trace, groups, rank, loads, plan = make_batch()
    layer, m = 0, 1
    weights = torch.randn(E, 16, 16)
    places = megatron.expert_of_place(plan, layer, m)
    slots = places.shape[1]
    assert (places[:, E // R :] >= 0).any()
    for source in range(R):
        part = of_rank(trace, groups, rank, m, source)
        ids = torch.from_numpy(part.expert_ids[:, layer].astype(np.int64))
        hidden, probs_TE = torch.randn(len(ids), 16), torch.rand(len(ids), E)
        column = megatron.places_of_assignments(plan, loads, part.expert_ids[:, layer], layer, m, source)
        probs, routing_map = megatron.to_places(probs_TE, ids, torch.from_numpy(column), places.size)
        total = torch.zeros_like(hidden)
        for target in range(R):
            indices = list(range(target * slots, (target + 1) * slots))
            dispatcher = MoEAllGatherTokenDispatcher(slots, indices, core.config(places.size), core.groups)
            rows, by_place = dispatcher.dispatch_preprocess(hidden[:, None], routing_map, probs)
            rows, by_place = dispatcher.token_dispatch(rows, by_place)
            rows, counts, weight = dispatcher.dispatch_postprocess(rows, by_place)
            pieces = [
                part_rows @ weights[expert]
                for part_rows, expert in zip(rows.split(counts.tolist()), places[target], strict=True)
            ]
            assert all(count == 0 for count, expert in zip(counts, places[target], strict=True) if expert < 0)
            out = dispatcher.combine_preprocess(torch.cat(pieces) * weight[:, None])
            total += dispatcher.combine_postprocess(dispatcher.token_combine(out))[:, 0]
        expected = torch.einsum("tk,th,tkhj->tj", probs_TE.gather(1, ids), hidden, weights[ids])
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_targets_of_a_share_of_the_tokens():
    trace, groups, rank, _, _ = make_batch(last_unknown=True)
    part = of_rank(trace, groups, rank, 0, 0)
    every = torch.stack(megatron.replay_targets(part), 1)
    seen = []
    for share in range(2):
        rows = TokenShare(share, 2).packed_rows(part)
        with pytest.raises(InputError, match=r"0 times; every recorded row is fed once \(whole=False"):
            megatron.replay_targets(part, rows=rows)
        got = torch.stack(megatron.replay_targets(part, rows=rows, whole=False), 1)
        known = (rows >= 0) & ~part.unknown[rows]
        assert got[known].equal(every[rows[known]])
        seen += rows[rows >= 0].tolist()
    assert sorted(seen) == list(range(part.num_tokens))
    with pytest.raises(InputError, match="row 1 2 times"):
        megatron.replay_targets(part, rows=np.array([0, 1, 1]), whole=False)


def with_a_hole(trace):
    ids = trace.expert_ids.copy()
    ids[1] = -1
    return RoutingTrace(ids, trace.offsets, trace.num_experts, trace.moe_layer_ids)


def test_holes_are_refused_or_left_to_be_routed_live():
    trace = with_a_hole(make_batch(last_unknown=True)[0])
    with pytest.raises(InputError, match="holes='live'"):
        megatron.replay_targets(trace)
    live = torch.stack(megatron.replay_targets(trace, holes="live"), 1)
    assert (live[1] == -1).all() and (live < 0).all(2).all(1).sum() == 1


@needs_megatron
def test_rows_without_routing_choose_for_themselves_and_are_recomputed_alike(core):
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    trace = with_a_hole(make_batch(last_unknown=True)[0])
    routers, hidden = make_routers(core), torch.randn(trace.num_tokens, 16)
    live = [routed(router, hidden)[1] for router in routers]
    with megatron.replaying(megatron.replay_targets(trace, holes="live")):
        maps = [routed(router, hidden)[1] for router in routers]
    replayed = torch.stack(megatron.replay_targets(trace, holes="live"), 1)
    for layer, routing_map in enumerate(maps):
        assert routing_map[1].equal(live[layer][1])
        assert (routing_map.nonzero()[:, 1].reshape(-1, K)[0] == replayed[0, layer].sort().values).all()
    core.RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    assert all(routed(router, hidden)[1].equal(m) for router, m in zip(routers, maps, strict=True))
    core.RouterReplay.clear_global_router_replay_action()


@needs_megatron
def test_only_the_models_routers_replay_and_own_entries_go(core):
    trace = make_batch()[0]
    model, other = torch.nn.ModuleList(make_routers(core)), make_routers(core)
    targets, hidden = megatron.replay_targets(trace), torch.randn(trace.num_tokens, 16)
    live = routed(other[0], hidden)[1]
    with pytest.raises(InputError, match=r"has 4 with RouterReplay; name the model"), megatron.replaying(targets):
        pass
    kept = torch.zeros(1, K, dtype=torch.int64)
    model[0].router_replay.replay_backward_list.append(kept)
    with torch.no_grad(), megatron.replaying(targets, [model[:1], model[1:]]):
        assert routed(other[0], hidden)[1].equal(live)
        with pytest.raises(ZeroDivisionError), megatron.replaying(targets, model):
            raise ZeroDivisionError
        chosen = routed(model[0], hidden)[1].nonzero()[:, 1].reshape(-1, K)
        assert chosen.equal(targets[0].sort(1).values)
    assert [one is kept for one in model[0].router_replay.replay_backward_list] == [True]
    assert not model[1].router_replay.replay_backward_list and model[0].router_replay.target_topk_idx is None
    with megatron.replaying(targets, model):
        pass
    assert model[1].router_replay.replay_backward_list == [targets[1]]
