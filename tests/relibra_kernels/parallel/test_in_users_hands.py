"""A model in its user's hands: validation, copies, state dicts, other dtypes, torch.compile, ranks that stop."""

from dataclasses import replace

import ep_hands
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.comm.collectives import Comm
from relibra_kernels.planner import CommunicationError

ON_TWO_NODES = replace(ep_hands.CASE, ranks=4, gpus_per_node=2)
CASES = {
    "two ranks": ep_hands.CASE,
    "four ranks, one hop": replace(ON_TWO_NODES, options=RuntimeOptions(transport="one")),
    "four ranks, two hops": replace(ON_TWO_NODES, options=RuntimeOptions(transport="two")),
    "four ranks, two hops, own node first": replace(
        ON_TWO_NODES, options=RuntimeOptions(transport="two", overlap=True)
    ),
}


@pytest.mark.parametrize("checkpoint", ["", "non-reentrant"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_training_without_a_batch_is_training_in_one_process(ranks, case, checkpoint):
    """Routing is live, with the experts where a batch before left them."""
    case = replace(case, checkpoint=checkpoint)
    assert max(ranks(case.ranks).run(ep_hands.live_training, case)) <= 1e-12


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_recorded_pass_is_the_batch_to_train_on(ranks, case):
    for same, error, replicas in ranks(case.ranks).run(ep_hands.record_then_train, case):
        assert same and replicas > 0 and error <= 1e-12


@pytest.mark.parametrize("case", list(CASES.values())[::2], ids=list(CASES)[::2])
def test_a_copy_of_a_model_stands_for_itself(ranks, case):
    assert max(ranks(case.ranks).run(ep_hands.copied, case)) <= 1e-12


def test_a_state_dict_does_not_load_into_another_order(ranks):
    for loaded, message in ranks(2).run(ep_hands.state_dicts):
        assert loaded and "experts have moved" in message


def test_experts_compute_in_their_own_dtype(ranks):
    """Fed bf16, their output is rounded once: half a unit in the last place of bf16."""
    for errors in ranks(2).run(ep_hands.other_dtypes):
        assert max(errors) <= 2**-8


@pytest.mark.parametrize("case", list(CASES.values())[::2], ids=list(CASES)[::2])
def test_a_compiled_model_is_one_graph(ranks, case):
    assert max(ranks(case.ranks).run(ep_hands.compiled, case)) <= 1e-12


def test_two_checkpointed_models_in_one_micro_batch(ranks):
    assert max(ranks(2).run(ep_hands.two_models)) <= 1e-12


@pytest.mark.parametrize(
    ("where", "reason"), [("rows", "name row 0 0 times"), ("between", "ValueError: the reward model is gone")]
)
def test_a_rank_that_stops_stops_the_others(where, reason):
    """Within seconds, by name; the collectives' own timeout is a minute."""
    ranks = Ranks(2)
    ranks.broken = True  # afterwards: their exchanges do not match any more
    try:
        (other, waited), (own, _) = ranks.run(ep_hands.one_rank_stops, where)
    finally:
        ranks.close()
    assert reason.removeprefix("ValueError: ") in own
    assert "rank 1" in other and waited < 10
    assert where == "rows" or reason in other


def test_gradients_are_rounded_once(ranks):
    summed, rounded = (ranks(2).run(ep_hands.summed_in, dtype) for dtype in (torch.float32, None))
    for once, often in zip(summed, rounded, strict=True):
        assert once <= 4e-3 and once < often


@pytest.mark.parametrize("closing", [False, True])
def test_runs_leave_nothing_behind(ranks, closing):
    for counts in ranks(2).run(ep_hands.made_again_and_again, closing):
        assert counts[1:] == [counts[1]] * 4  # threads, open files


def test_a_closed_runtime_refuses_to_run(ranks):
    assert all("after ExpertParallel.close" in message for message in ranks(2).run(ep_hands.after_closing))


def test_a_rank_that_runs_more_forwards_than_the_others_stops():
    """In ten seconds by default, by name; the collectives' own timeout is a minute."""
    assert RuntimeOptions().live_wait_seconds < 10
    ranks = Ranks(2)
    ranks.broken = True  # one of them waits for an exchange that never comes
    try:
        (error, waited, ran), (other, _, others) = ranks.run(ep_hands.one_forward_more)
    finally:
        ranks.close()
    assert ran == others == 2 and not other
    assert 2.5 < waited < 5
    assert "rank 0 has waited 3 s for rank 1" in error and "with generate, synced_gpus=True" in error
    assert "RuntimeOptions.live_wait_seconds" in error


def test_a_rank_that_pauses_between_forwards_is_waited_for(ranks):
    first, _ = ranks(2).run(ep_hands.forwards_after_pauses)
    assert first > 2.5


def test_a_second_model_does_not_take_the_firsts_ranks_for_its_own(monkeypatch):
    """Both number their collectives from one, and what a rank has said in the store stays there."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "gloo")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group=None: [0, 1])
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    first, second = Comm(object(), 2), Comm(object(), 2)
    assert first._missing() == [1]
    first.rank = 1
    assert first._missing() == []  # both have said so
    assert second._missing() == [1]


def test_patience_is_for_ranks_that_have_not_begun(monkeypatch):
    """An exchange that all ranks are in is waited for, however long it takes."""

    class SlowWork:
        looks = 0

        def wait(self, timeout=None):
            self.looks += 1
            if self.looks < 3:
                raise RuntimeError("timed out")

        def is_completed(self):
            return self.looks >= 3

    comm = Comm.__new__(Comm)
    comm.alarm, comm._waits_on_host, comm._name = None, True, (0, 2)
    monkeypatch.setattr(comm, "_missing", lambda: [])
    work = SlowWork()
    comm.wait(work, patience=0.0)
    assert work.looks == 3
    monkeypatch.setattr(comm, "_missing", lambda: [1])
    with pytest.raises(CommunicationError, match="rank 0 has waited 0 s for rank 1"):
        comm.wait(SlowWork(), patience=0.0)
