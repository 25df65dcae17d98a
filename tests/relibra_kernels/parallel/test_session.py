"""What keeps activations, threads and micro-batches apart, without a process group."""

import operator
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.comm.ledger import Ledger
from relibra_kernels.parallel.session import ForwardContext, Session
from relibra_kernels.parallel.tokens.layer import check_tag
from relibra_kernels.planner import InputError


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_finds_its_own_micro_batch(reentrant):
    """Also while another one is open, and in another thread."""
    context: ForwardContext[int] = ForwardContext()
    seen: list[int] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(context.find())
        return x.sin().exp()

    outputs = []
    for micro_batch in range(3):
        with context.entered(micro_batch):
            x = torch.ones(4, requires_grad=True)
            outputs.append(checkpoint(block, checkpoint(block, x, use_reentrant=reentrant), use_reentrant=reentrant))
    seen.clear()
    with context.entered(7):
        outputs[1].sum().backward()
    thread = threading.Thread(target=outputs[2].sum().backward)
    thread.start()
    thread.join()
    outputs[0].sum().backward()
    assert seen == [1, 1, 2, 2, 0, 0]
    assert context.find() is None


def test_modification_in_place_is_still_refused():
    """The hooks that remember the micro-batch do not hide what autograd checks."""
    context: ForwardContext[int] = ForwardContext()
    weight = torch.ones(3, requires_grad=True)
    with context.entered(0):
        y = weight * 2
        z = (y * y).sum()
    y.data.add_(0)  # leaves the version alone, as FSDP2 does
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        z.backward()


def test_a_graph_that_never_runs_backward_is_let_go_of():
    """Also where a node saves its own output."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept = x * 2
            alive.append(weakref.ref(kept))
            ctx.save_for_backward(kept)
            return x + 1

    alive: list[weakref.ref[torch.Tensor]] = []
    context: ForwardContext[int] = ForwardContext()
    with context.entered(0):
        y = Node.apply(torch.ones(3, requires_grad=True)).exp()
    assert alive[0]() is not None
    del y
    assert alive[0]() is None


def test_activations_of_another_micro_batch_are_refused():
    expected = torch.tensor([4, 0, 2])
    check_tag(expected.clone(), expected, "layer 2, micro-batch 0")
    with pytest.raises(InputError, match="got the activations of layer 2, micro-batch 1"):
        check_tag(torch.tensor([4, 1, 2]), expected, "layer 2, micro-batch 0")


def test_two_threads_in_one_batch_are_refused():
    session = Session(RuntimeOptions(), Ledger())
    problems: list[Exception] = []

    def enter() -> None:
        try:
            with session.running("layer 1"):
                pass
        except InputError as error:
            problems.append(error)

    with session.running("layer 0"), session.running("layer 0"):  # a recomputation is within its backward
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(problems) == 1 and "another thread" in str(problems[0])
    enter()
    assert len(problems) == 1


def test_a_layer_is_checked_for_every_weights_that_it_runs_with():
    session = Session(RuntimeOptions(), Ledger())
    weights = torch.zeros(2), None
    asked = [(0, weights), (0, weights), (1, weights), (0, (torch.zeros(2), None)), (0, weights)]
    assert [session.checked(*each) for each in asked] == [False, True, False, False, False]


@dataclass(frozen=True)
class HoldsTensors:
    """As what a replay's forward is bound to: it cannot be compared."""

    ids: torch.Tensor


def test_forwards_that_follow_each_other_while_one_is_open_stay_apart():
    context: ForwardContext[HoldsTensors] = ForwardContext()
    states = [HoldsTensors(torch.arange(3)) for _ in range(2)]
    seen: list[HoldsTensors] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(context.find())
        return x.sin().exp()

    with context.entered(None):
        outputs = []
        for context.current in states:
            x = torch.ones(4, requires_grad=True)
            outputs.append(checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False))
    seen.clear()
    for output in outputs:
        output.sum().backward()
    assert all(map(operator.is_, seen, [states[0], states[0], states[1], states[1]])) and len(seen) == 4
