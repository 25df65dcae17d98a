"""Training under a plan on R ranks is training in one process: losses, every gradient, parameters after the steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerance import relative_error
from toy_training import Case, train_alone, train_parallel
from training_checks import assert_same_bits, worst_error

from relibra_kernels.nn import GPT_OSS
from relibra_kernels.parallel import RuntimeOptions

UNEQUAL = (17, 2, 1, 2, 30, 1, 2, 2)  # rank 0 has nearly all tokens; a sequence of one token has nothing recorded
ONE_SIDED = (6, 0, 9, 0, 4, 0, 5, 0)  # on two ranks, the second has no token at all

CASES = {
    "one rank": Case(ranks=1, gpus_per_node=1),
    "static": Case(plan="static"),
    "planned": Case(),
    "every slot used": Case(plan="shuffled"),
    "no replica slots": Case(replica_slots=0, plan="shuffled"),
    "expert without tokens": Case(routing="empty_expert", plan="shuffled"),
    "all tokens the same experts": Case(routing="same", replica_slots=3),
    "unequal token counts": Case(sequence_lengths=UNEQUAL, plan="shuffled"),
    "a rank without tokens": Case(sequence_lengths=ONE_SIDED, plan="shuffled"),
    "padding": Case(padding=3, plan="shuffled"),
    "padding on a rank without tokens": Case(padding=2, sequence_lengths=ONE_SIDED, plan="shuffled"),
    "padding in place of sequences": Case(
        padding=2, sequence_lengths=(6, 5), micro_batches=1, ranks=3, gpus_per_node=3, experts=9, plan="shuffled"
    ),
    "gpt-oss form": Case(form=GPT_OSS, plan="shuffled"),
    "main_grad": Case(main_grad=True, plan="shuffled"),
    "main_grad, some frozen": Case(main_grad=True, plan="shuffled", frozen=("down_proj",)),
    "four ranks": Case(ranks=4, gpus_per_node=4),
    "four ranks on two nodes": Case(ranks=4, gpus_per_node=2, plan="shuffled"),
    "three ranks, more choices than local experts": Case(
        ranks=3, gpus_per_node=1, experts=9, top_k=5, plan="shuffled", sequence_lengths=(5, 9, 3, 7, 6, 4)
    ),
    "recompute, shared experts": Case(recompute=True, shared_experts=True, plan="shuffled"),
    "frozen experts": Case(frozen=("gate_up_proj", "down_proj"), plan="shuffled", steps=2),
    "one frozen projection": Case(frozen=("gate_up_proj",), plan="shuffled", steps=2),
    "experts that do not divide": Case(ranks=3, gpus_per_node=3, experts=10, plan="uneven", steps=3),
    "as many experts as ranks": Case(ranks=4, gpus_per_node=4, experts=4, plan="shuffled"),
    "steps with migration": Case(plan="shuffled", steps=4),
    "replicas fetched for every micro-batch": Case(plan="fetched"),
    "fetched on two nodes": Case(ranks=4, gpus_per_node=2, plan="fetched"),
    "replicas kept in some layers": Case(plan="mixed", layers=3),
    "received rows fetched again": Case(plan="shuffled", options=RuntimeOptions(redispatch=True)),
    "own rows while others travel": Case(
        ranks=3, gpus_per_node=3, experts=9, plan="shuffled", options=RuntimeOptions(overlap=True)
    ),
    "overlap and redispatch on one rank": Case(
        ranks=1, gpus_per_node=1, options=RuntimeOptions(overlap=True, redispatch=True)
    ),
    "checkpointed blocks": Case(plan="shuffled", checkpoint="non-reentrant"),
    "checkpointed, reentrant, backward outside": Case(plan="shuffled", checkpoint="reentrant", order="after"),
    "checkpointed, backward in another thread": Case(plan="shuffled", checkpoint="non-reentrant", order="thread"),
    "checkpointed, two micro-batches in flight": Case(
        plan="shuffled", checkpoint="non-reentrant", order="one_ahead", micro_batches=4, padding=1
    ),
    "equal token counts in flight": Case(
        plan="shuffled", checkpoint="reentrant", order="one_ahead", sequence_lengths=(6,) * 8
    ),
    "one backward over all micro-batches": Case(plan="shuffled", checkpoint="non-reentrant", order="together"),
    "gradients of inputs before those of weights": Case(plan="shuffled", order="split"),
    "gradients of inputs before, main_grad": Case(plan="mixed", layers=3, order="split", main_grad=True),
    "gradients of inputs before, checkpointed": Case(plan="fetched", order="split", checkpoint="non-reentrant"),
    "backward in another thread": Case(plan="shuffled", order="thread"),
    "passes without gradients before": Case(plan="shuffled", passes_before=2, micro_batches=4),
    "tokens routed live": Case(plan="shuffled", unrecorded=0.3, sequence_lengths=UNEQUAL),
    "tokens routed live, checkpointed, padded": Case(
        plan="shuffled", unrecorded=0.2, checkpoint="non-reentrant", order="after", padding=2, main_grad=True
    ),
    "momentum moves with its expert": Case(plan="shuffled", steps=4, optimizer="momentum"),
    "planned steps": Case(ranks=4, gpus_per_node=2, steps=4, sequence_lengths=(9, 14, 6, 11) * 4),
}


def check_parity(case: Case, results: list[dict], tolerance: float) -> None:
    losses, gradients, parameters = train_alone(case)
    for result in results:
        np.testing.assert_allclose(result["losses"], losses, rtol=tolerance)
        for step in range(case.steps):
            assert worst_error(result["gradients"][step], gradients[step]) <= tolerance
        assert worst_error(result["parameters"], parameters) <= tolerance


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parity_in_float64(ranks, case):
    results = ranks(case.ranks).run(train_parallel, case)
    if case.plan == "shuffled":
        assert results[0]["moved"] > 0
        assert (results[0]["replicas"] > 0) == (case.replica_slots > 0)
    check_parity(case, results, 1e-12)


def on_two_nodes(case: Case) -> Case:
    """The case on four ranks as two nodes, between which tokens cross once and are handed on inside."""
    lengths = case.sequence_lengths * max(1, case.micro_batches // 2)  # eight are one a rank in two micro-batches
    options = replace(case.options, transport="two")
    return replace(case, ranks=4, gpus_per_node=2, sequence_lengths=lengths, options=options)


@pytest.mark.parametrize("case", [on_two_nodes(case) for case in CASES.values()], ids=CASES.keys())
def test_parity_in_float64_with_two_hops(ranks, case):
    check_parity(case, ranks(4).run(train_parallel, case), 1e-12)


def test_own_node_first_while_others_cross(ranks):
    """With overlap a node's own tokens are a chunk of their own, with a second hop of its own."""
    for redispatch in (False, True):
        options = RuntimeOptions(overlap=True, redispatch=redispatch)
        case = on_two_nodes(Case(plan="shuffled", unrecorded=0.2, options=options, checkpoint="non-reentrant"))
        check_parity(case, ranks(4).run(train_parallel, case), 1e-12)


@pytest.mark.parametrize(
    ("plan", "scoring"), [("planned", "softmax"), ("shuffled", "softmax"), ("shuffled", "sigmoid")]
)
def test_parity_in_float32(ranks, plan, scoring):
    case = Case(
        plan=plan, scoring=scoring, dtype=torch.float32, steps=2, hidden=32, intermediate=48, learning_rate=1e-3
    )
    check_parity(case, ranks(2).run(train_parallel, case), 1e-5)
    case = on_two_nodes(case)
    check_parity(case, ranks(4).run(train_parallel, case), 1e-5)


def test_dense_parameters_of_two_dtypes(ranks):
    """Their gradients are reduced dtype by dtype, in the same order on every rank."""
    case = Case(plan="shuffled", dtype=torch.float64, output_dtype=torch.float32, steps=2)
    check_parity(case, ranks(2).run(train_parallel, case), 1e-5)


@pytest.mark.parametrize("hops", [1, 2])
def test_bfloat16_stays_near_float32(ranks, hops):
    """Partial sums of a token are rounded to bf16 once for each rank that it visits: a few times 2^-9."""
    case = Case(plan="shuffled", dtype=torch.bfloat16, hidden=32, intermediate=48)
    case = case if hops == 1 else on_two_nodes(case)
    results = ranks(case.ranks).run(train_parallel, case)
    _, gradients, _ = train_alone(replace(case, dtype=torch.float32))
    exact = train_alone(case)[1]
    for result in results:
        error, rounding = (worst_error(run, gradients[0]) for run in (result["gradients"][0], exact[0]))
        assert error <= 2 * rounding + 2**-8


@pytest.mark.parametrize("size", [2, 4])
def test_twenty_steps_with_migration(ranks, size):
    """A new plan and migration at every step, AdamW, fp32: parameters within 1e-5, the same bits twice."""
    case = Case(
        ranks=size,
        gpus_per_node=2,
        plan="shuffled",
        dtype=torch.float32,
        steps=20,
        micro_batches=4 // size,
        hidden=32,
        learning_rate=1e-3,
    )
    first = ranks(size).run(train_parallel, case)
    losses, _, parameters = train_alone(case)
    assert first[0]["moved"] > 20
    for result in first:
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
        assert worst_error(result["parameters"], parameters) <= 1e-5
    if size == 2:
        assert_same_bits(first, ranks(size).run(train_parallel, case))


def test_partial_sums_unrounded_on_request(ranks):
    """In bf16 with four partial sums a token: added up in fp32, they give what one process gives; twice the bytes."""
    case = Case(ranks=4, gpus_per_node=4, top_k=4, plan="static", dtype=torch.bfloat16, hidden=64, layers=1)
    alone = torch.from_numpy(train_alone(case)[1][0]["embedding.weight"])
    errors, sent = [], []
    for dtype in (None, torch.float32):
        result = ranks(4).run(train_parallel, replace(case, options=RuntimeOptions(combine_dtype=dtype)))[0]
        errors.append(relative_error(torch.from_numpy(result["gradients"][0]["embedding.weight"]), alone))
        sent.append(result["bytes"]["combine", "fast"])
    assert errors[1] < errors[0] / 2
    assert sent[1] == 2 * sent[0]


def test_same_plans_same_bits(ranks):
    case = Case(plan="shuffled", dtype=torch.float32, steps=2)
    for each in (case, on_two_nodes(case)):
        first, second = (ranks(each.ranks).run(train_parallel, each) for _ in range(2))
        assert_same_bits(first, second)


def test_a_layer_without_replicas_sends_nothing_for_them(ranks):
    sent = ranks(2).run(train_parallel, Case(plan="static"))[0]["bytes"]
    assert {kind for kind, _ in sent} == {
        "counts",
        "slots",
        "dispatch",
        "combine",
        "backward dispatch",
        "backward combine",
    }


def test_traffic_is_counted_by_node(ranks):
    case = Case(ranks=4, gpus_per_node=2, plan="shuffled")
    sent = ranks(4).run(train_parallel, case)[0]["bytes"]
    assert sent["dispatch", "fast"] > 0 and sent["dispatch", "slow"] > 0
    one_node = ranks(4).run(train_parallel, replace(case, gpus_per_node=4))[0]["bytes"]
    assert {speed for _, speed in one_node} == {"fast"}
