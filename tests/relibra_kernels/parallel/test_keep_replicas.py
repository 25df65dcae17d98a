"""Replicas kept from forward to backward: the same bits, half the bytes, and nothing stays longer than its graph."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ep_kept import copied_of_kept_replicas, lives_of_kept_replicas, lives_of_replicas
from toy_training import Case, train_parallel
from training_checks import assert_same_bits

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.experts.replicas import ReplicaPushes, ReplicaRoute, Transfers
from relibra_kernels.weights import ExpertWeights

FETCH = Case(plan="fetched")
CASES = {
    "one micro-batch after the other": FETCH,
    "two in flight": replace(FETCH, order="one_ahead", micro_batches=4),
    "one backward over all": replace(FETCH, order="together"),
    "backward in another thread": replace(FETCH, order="thread"),
    "passes without gradients before": replace(FETCH, passes_before=1),
    "checkpointed": replace(FETCH, checkpoint="non-reentrant", order="after"),
    "checkpointed, reentrant, two in flight": replace(FETCH, checkpoint="reentrant", order="one_ahead"),
    "h computed again, main_grad": replace(FETCH, recompute=True, main_grad=True),
    "kept replicas": Case(plan="shuffled"),
    "kept replicas above fetched ones": Case(plan="mixed"),
    "rows fetched again": replace(FETCH, options=RuntimeOptions(redispatch=True, overlap=True)),
    "tokens routed live": replace(FETCH, unrecorded=0.2),
    "two hops": replace(FETCH, ranks=4, options=RuntimeOptions(transport="two"), sequence_lengths=(6,) * 16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_same_bits_with_fewer_pushes(ranks, case):
    keeping = replace(case, options=replace(case.options, keep_replicas=True))
    without, kept = (ranks(case.ranks).run(train_parallel, each) for each in (case, keeping))
    assert_same_bits(without, kept)
    for pushed, once in zip(without, kept, strict=True):
        before, after = (result["bytes"].get(("replica_weights", "fast"), 0) for result in (pushed, once))
        passes = 2 + case.passes_before
        assert after * passes == before * (passes if case.checkpoint else passes - 1)


def test_replicas_live_as_long_as_their_graph(ranks):
    """None after a pass without gradients; then 4 graphs of 2 layers, of which backward lets go one after the other."""
    keeping = replace(FETCH, options=RuntimeOptions(keep_replicas=True))
    for moments in ranks(2).run(lives_of_replicas, keeping):
        assert moments == [0, 8, 6, 2, 0]


def test_replicas_are_let_go_of_by_default(ranks):
    for moments in ranks(2).run(lives_of_replicas, FETCH):
        assert moments == [0] * 5


def test_a_batch_that_failed_lets_go_of_its_replicas():
    """Of those that a recomputed forward holds for its backward, and that arrived."""
    weights = ExpertWeights(torch.zeros(2, 4, 3), torch.zeros(2, 3, 2))
    first = torch.zeros(1, dtype=torch.int64)
    to_itself = Transfers(first, first - 1, [1], [1], first.numpy(), anywhere=True, sends_kept=False)
    route = ReplicaRoute(to_itself, 0, torch.zeros(2, dtype=torch.int32))
    comm = SimpleNamespace(start=lambda sent, *_: SimpleNamespace(wait=lambda: sent))
    pushes = ReplicaPushes(comm, lambda layer: weights, lambda layer: None)
    held = weakref.ref(pushes.take(0, 0, True, route, hold=True).gate_up)
    assert held() is not None
    pushes.close()
    assert held() is None


def test_kept_replicas_live_as_long_as_their_batch(ranks):
    assert ranks(2).run(lives_of_kept_replicas, Case(plan="shuffled")) == [(True, False)] * 2


def test_kept_replicas_are_not_copied(ranks):
    """Layers read their weights, and add up their gradients, where the batch keeps them."""
    case = Case(plan="shuffled", dtype=torch.bfloat16, micro_batches=4, sequence_lengths=(5,) * 8)
    assert ranks(2).run(copied_of_kept_replicas, case) == [0, 0]
