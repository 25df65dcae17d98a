"""What verl and slime replay by: their own objects in Megatron's routers are fed, and left as they were."""

import numpy as np
import pytest
import torch
from trainer_replays import Model, RouterReplayAction, SlimeReplay, VerlReplay, live_topk, slime_topk

from relibra_kernels import ClusterSpec, RoutedBatch
from relibra_kernels.integrations import megatron, slime, verl
from relibra_kernels.integrations.batches import plan_micro_batches
from relibra_kernels.integrations.megatron_choice import RecordedChoice
from relibra_kernels.integrations.megatron_shares import TokenShare
from relibra_kernels.planner import RoutingTrace
from relibra_kernels.planner.errors import InputError

E, K, L = 8, 2, 2


def make_trace(holes=(), lengths=(5, 4)):
    random = np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths])
    ids = random.random((offsets[-1], L, E)).argsort(-1)[..., :K].astype(np.int16)
    ids[list(holes)] = -1
    return RoutingTrace(ids, offsets, E, range(L))


def verl_choices(model, scores):
    return [replay.get_replay_topk(scores, K, None, None, live_topk)[1] for replay in model.replays("router_replay")]


def test_verls_own_class_replays_and_masks_unknown_rows():
    model, other = Model("router_replay", VerlReplay), Model("router_replay", VerlReplay)
    scores, trace = torch.rand(9, E), make_trace(holes=[2])
    live, targets = live_topk(scores, K)[1], megatron.replay_targets(trace, holes="live")
    before = torch.zeros(9, K, dtype=torch.int64)
    model.replays("router_replay")[0].target_topk_idx = before
    with torch.no_grad(), megatron.replaying(targets, model):
        for chosen, target in zip(verl_choices(model, scores), targets, strict=True):
            assert chosen[2].equal(live[2])
            known = torch.arange(9) != 2
            assert chosen[known].equal(target[known])
        assert model.mtp[0].router.router_replay.router_replay_action is None
        assert verl_choices(other, scores)[0].equal(live)  # a reference model in the process
    first, second = model.replays("router_replay")
    assert first.target_topk_idx is before and second.target_topk_idx is None
    for replay in (first, second):
        assert replay.router_replay_action is replay.target_replay_mask is None
        assert not replay.replay_backward_list and not replay.replay_backward_mask_list


def test_verls_own_class_recomputes_every_micro_batch():
    model, scores = Model("router_replay", VerlReplay), torch.rand(9, E)
    chosen = []
    for holes in ([2], []):
        with megatron.replaying(megatron.replay_targets(make_trace(holes), holes="live"), model):
            chosen.append(verl_choices(model, scores))
    for replay in model.replays("router_replay"):
        replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    for expected in chosen:
        assert all(a.equal(b) for a, b in zip(verl_choices(model, scores), expected, strict=True))


def test_an_error_within_leaves_verls_class_as_it_was():
    model = Model("router_replay", VerlReplay)
    with pytest.raises(ZeroDivisionError), megatron.replaying(megatron.replay_targets(make_trace()), model):
        raise ZeroDivisionError
    for replay in model.replays("router_replay"):
        assert not replay.replay_backward_list and not replay.replay_backward_mask_list
        assert replay.target_topk_idx is None and replay.router_replay_action is None


def with_our_layers(scores):
    """A model whose routers have our choice in the place of verl's object."""
    model = Model("router_replay", VerlReplay)
    for module in model.decoder:
        module.router.router_replay = RecordedChoice(module.router, K)
    return model, lambda: verl_choices(model, scores)


def test_in_our_layer_the_runtime_answers_and_else_what_verl_set():
    scores = torch.rand(9, E)
    model, chosen = with_our_layers(scores)
    choices, targets = model.replays("router_replay"), megatron.replay_targets(make_trace())
    for choice in choices:
        choice.begin()
    with megatron.replaying(targets, model):  # reaches the object behind the choice
        assert all(a.equal(b) for a, b in zip(chosen(), targets, strict=True))
    assert all(a.equal(live_topk(scores, K)[1]) for a in chosen())
    for choice, target in zip(choices, targets, strict=True):  # as verl's worker walks a model's routers
        choice.set_target_indices(target, replay_mask=None)
        choice.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert all(a.equal(b) for a, b in zip(chosen(), targets, strict=True))
    recorded = (targets[0] + 1) % E
    recorded[3] = -1
    choices[0].replay = lambda: (recorded, False)
    choices[0].begin()
    got = chosen()[0]
    assert got[3].equal(live_topk(scores, K)[1][3]) and got[:3].equal(recorded[:3]) and got[4:].equal(recorded[4:])
    with pytest.raises(AttributeError, match="no 'set_target_indices', and no RouterReplay"):
        RecordedChoice(torch.nn.Module(), K).set_target_indices(targets[0])


def test_slimes_routers_are_fed_every_micro_batch_of_a_share():
    model, share = Model("routing_replay", SlimeReplay), TokenShare(1, 2, 0, 2)
    traces = [make_trace(), make_trace(lengths=(3, 6))]
    fed = []
    for trace in traces:
        rows = share.packed_rows(trace, total=4)
        fed.append(megatron.replay_targets(trace, rows=rows, whole=False))
        slime.feed_replay(fed[-1], [model])
    for stage in ("replay_forward", "replay_backward"):
        for targets in fed:
            for replay, target in zip(model.replays("routing_replay"), targets, strict=True):
                scores = torch.rand(len(target), E)
                assert slime_topk(replay, stage, live_topk)(scores, K)[1].equal(target.int())
    assert not model.mtp[0].router.routing_replay.top_indices_list


def test_slimes_routers_are_fed_wholly_or_not_at_all():
    model, targets = Model("routing_replay", SlimeReplay), megatron.replay_targets(make_trace([2]), holes="live")
    with pytest.raises(InputError, match=r"targets\[0\] has -1 in row 2"):
        slime.feed_replay(targets, model)
    with pytest.raises(InputError, match="targets are for 1 routers, but model has 2"):
        slime.feed_replay(megatron.replay_targets(make_trace())[:1], model)
    with pytest.raises(InputError, match="model has 0 with slime's RoutingReplay"):
        slime.feed_replay(targets, Model("router_replay", VerlReplay))
    assert not any(replay.top_indices_list for replay in model.replays("routing_replay"))


def test_slimes_top_k_that_falls_through_asks_our_choice():
    router, scores = torch.nn.Module(), torch.rand(9, E)
    choice, recorded = RecordedChoice(router, K), megatron.replay_targets(make_trace())[0]
    choice.replay = lambda: (recorded, True)
    choice.begin()

    def megatrons(scores, topk, num_groups=None, group_topk=None):
        return choice.get_replay_topk(scores, topk, num_groups, group_topk, live_topk)

    assert slime_topk(SlimeReplay(), "fallthrough", megatrons)(scores, K)[1].equal(recorded)


def test_dynamic_micro_batches_of_a_worker_are_those_of_the_whole_batch():
    """verl's worker deals out its own rows by their local numbers; tool results have no routing."""
    prompt, response, rows = 3, 5, 6
    routed = torch.rand(rows, prompt + response, L, E).argsort(-1)[..., :K].to(torch.int16)
    response_mask = torch.ones(rows, response, dtype=torch.int64)
    response_mask[[1, 4], -2:] = 0  # ends in a tool result
    routed[[1, 4], -2:] = 0
    routed[:, -1] = 0
    batch = {
        "routed_experts": routed,
        "attention_mask": torch.ones(rows, prompt + response, dtype=torch.int64),
        "response_mask": response_mask,
    }
    local = [[[2, 0], [1]], [[1], [0, 2]]]  # of each worker's three rows
    whole = plan_micro_batches(
        verl.trace_of_batch(batch, E), [[[2, 0], [1]], [[4], [3, 5]]], ClusterSpec(1, 2, 2)
    ).batch
    for rank in range(2):
        own = {name: value[3 * rank : 3 * rank + 3] for name, value in batch.items()}
        mine = RoutedBatch.from_micro_batches(verl.trace_of_batch(own, E), [local[rank]])
        np.testing.assert_array_equal(mine.loads()[:, :, 0], whole.loads()[:, :, rank])
        for m in range(2):
            a, b = whole.of_rank(rank), mine.of_rank(0)
            for i, j in zip(a.sequences(m), b.sequences(m), strict=True):
                np.testing.assert_array_equal(a.trace.sequence(i), b.trace.sequence(j))
    assert whole.trace.unknown.sum() == rows + 2
