"""verl and slime: batches of their shapes in, plans out."""

import numpy as np
import pytest
import torch

from relibra_kernels.integrations import megatron, slime, verl
from relibra_kernels.integrations.batches import plan_micro_batches
from relibra_kernels.integrations.megatron_shares import TokenShare
from relibra_kernels.parallel import RoutedBatch
from relibra_kernels.planner import BatchPlan, ClusterSpec, PlanOptions, count_loads
from relibra_kernels.planner.errors import InputError, ShapeError

E, K, LAYERS, R = 8, 2, 3, 2  # the first layer is dense
PROMPTS, RESPONSES = [3, 5, 2, 4, 5, 3, 4, 2], [6, 2, 4, 6, 5, 3, 1, 6]
CLUSTER = ClusterSpec(1, R, 2)


@pytest.fixture
def routing():
    """int [N - 1, LAYERS, K] of each sequence, skewed."""
    random = np.random.default_rng(0)
    popularity = np.array([1, 1, 1, 9, 5, 1, 1, 2])
    out = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        keys = random.random((prompt + response - 1, LAYERS, E)) ** (1 / popularity)
        ids = keys.argsort(-1)[..., ::-1][..., :K].copy()
        ids[:, 0] = 0
        out.append(ids)
    return out


def verl_batch(routing):
    """`DataProto.batch`: prompts end at column 6, responses start there."""
    shape = (len(routing), 6 + 7)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "routed_experts": torch.zeros((*shape, LAYERS, K), dtype=torch.int16),
    }
    for i, (ids, prompt, response) in enumerate(zip(routing, PROMPTS, RESPONSES, strict=True)):
        real = slice(6 - prompt, 6 + response)
        batch["input_ids"][i, real] = torch.arange(1, prompt + response + 1)
        batch["attention_mask"][i, real] = 1
        batch["routed_experts"][i, 6 - prompt : 6 + response - 1] = torch.from_numpy(ids.astype(np.int16))
    return batch


def slime_rollout(routing):
    return {
        "tokens": [torch.arange(len(ids) + 1) for ids in routing],
        "rollout_routed_experts": [torch.from_numpy(ids.astype(np.int32)) for ids in routing],
    }


def check_trace(trace, routing):
    assert trace.moe_layer_ids == (1, 2) and trace.only_last_tokens_unknown
    for i, ids in enumerate(routing):
        np.testing.assert_array_equal(trace.sequence(i)[:-1], ids[:, 1:])
        assert (trace.sequence(i)[-1] == -1).all()


def test_verl_padded_and_jagged(routing):
    batch = verl_batch(routing)
    check_trace(verl.trace_of_batch(batch, E), routing)
    rows = [batch["routed_experts"][i][batch["attention_mask"][i] == 1] for i in range(len(routing))]
    ids = [batch["input_ids"][i][batch["attention_mask"][i] == 1] for i in range(len(routing))]
    jagged = {
        "routed_experts": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
        "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
    }
    check_trace(verl.trace_of_batch(jagged, E), routing)
    jagged["input_ids"] = torch.nested.as_nested_tensor([ids[0][:-1], *ids[1:]], layout=torch.jagged)
    with pytest.raises(InputError, match="sequence 0 has 9 rows, but its 8 tokens need 8"):
        verl.trace_of_batch(jagged, E)
    batch["routed_experts"] = batch["routed_experts"].roll(1, 1)
    with pytest.raises(InputError, match="sequence 0 has no routing"):
        verl.trace_of_batch(batch, E)
    with pytest.raises(InputError, match="enable_rollout_routing_replay"):
        verl.trace_of_batch({"input_ids": 0}, E)


def test_slime(routing):
    rollout = slime_rollout(routing)
    check_trace(slime.trace_of_rollout(rollout, E), routing)
    rollout["tokens"][2] = torch.arange(99)
    with pytest.raises(InputError, match="sequence 2 has"):
        slime.trace_of_rollout(rollout, E)
    with pytest.raises(InputError, match="--use-rollout-routing-replay"):
        slime.trace_of_rollout({"tokens": []}, E)


DTYPES = (torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_of_every_dtype_in_the_helpers(routing, dtype):
    batch, rollout = verl_batch(routing), slime_rollout(routing)
    batch["routed_experts"] = batch["routed_experts"].to(dtype)
    rollout["rollout_routed_experts"] = [ids.to(dtype) for ids in rollout["rollout_routed_experts"]]
    check_trace(verl.trace_of_batch(batch, E), routing)
    check_trace(slime.trace_of_rollout(rollout, E), routing)
    rollout["rollout_routed_experts"][3] = list(rollout["rollout_routed_experts"][3].split(4))  # turns
    check_trace(slime.trace_of_rollout(rollout, E), routing)
    if dtype.itemsize == 1:
        for helper, data in ((verl.trace_of_batch, batch), (slime.trace_of_rollout, rollout)):
            with pytest.raises(ShapeError, match="have wrapped around"):
                helper(data, 384)


@pytest.mark.parametrize("fill", [0, -1])
def test_holes_mean_the_same_in_every_helper(routing, fill):
    """One layer of token 4 of sample 1: refused by name, or that token unknown, in the trace and in the loads."""
    routing[1][4, 2] = fill
    batch, rollout = verl_batch(routing), slime_rollout(routing)
    of_ranks = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    helpers = (
        lambda **record: verl.trace_of_batch(batch, E, **record),
        lambda **record: slime.trace_of_rollout(rollout, E, **record),
        lambda **record: verl.plan_for_update(batch, E, CLUSTER, 2, **record),
        lambda **record: slime.plan_for_train(rollout, E, CLUSTER, of_ranks, **record),
    )
    for helper in helpers:
        with pytest.raises(
            InputError, match=r"sequence 1 has no routing for 1 tokens, the first is token 4 in layers \[2\]"
        ):
            helper()
        with pytest.raises(InputError, match="holes is 'ignore'"):
            helper(holes="ignore")
    for found in (helper(holes="unknown") for helper in helpers):
        trace = getattr(found, "batch", found).trace if hasattr(found, "plan") else found
        assert np.flatnonzero(trace.unknown[trace.offsets[1] : trace.offsets[2]]).tolist() == [4, 6]
        assert trace.report.unknown == {"last token of its sequence": 8, "not recorded by the engine": 1}
        if hasattr(found, "plan"):
            assert found.loads[:, 0, 0].sum() == 2 * K * (9 - 1 + 7 - 1 - 1)


LEVEL = PlanOptions(balance=1.0)


def test_plans_are_for_what_every_rank_trains_on(routing):
    planned = verl.plan_for_update(verl_batch(routing), E, CLUSTER, micro_batch_size_per_gpu=2, options=LEVEL)
    micro_batches = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    same = slime.plan_for_train(slime_rollout(routing), E, CLUSTER, micro_batches, options=LEVEL)
    np.testing.assert_array_equal(planned.plan.replicas, same.plan.replicas)
    assert planned.plan.loads_sha256 == same.plan.loads_sha256
    own = [[0, 1, 2, 3], [4, 5, 6, 7]], [[[0, 1], [2, 3]]] * 2  # slime's indices point into a rank's own samples
    local = slime.plan_for_train(slime_rollout(routing), E, CLUSTER, own[1], partition_of_rank=own[0])
    np.testing.assert_array_equal(local.loads, planned.loads)
    for rank in range(R):
        part = planned.batch.of_rank(rank)
        trace, groups = part.trace, part.micro_batch_of_sequence
        assert groups.tolist() == [0, 0, 1, 1]
        np.testing.assert_array_equal(count_loads(trace, groups, 2), planned.loads[:, :, rank])
        np.testing.assert_array_equal(trace.sequence(2), planned.batch.trace.sequence(4 * rank + 2))
    assert isinstance(planned.plan, BatchPlan)
    static = planned.loads.sum(2).reshape(2, 2, R, -1).sum(-1)
    assert planned.plan.imbalance_mean(planned.loads) < (static.max(-1) / static.mean(-1)).mean()
    again = verl.plan_for_update(verl_batch(routing), E, CLUSTER, 2, previous_home=planned.plan.home)
    assert (again.plan.home != planned.plan.home).sum() == 0

    uneven = plan_micro_batches(planned.batch.trace, [[[5], []], [[2, 1, 0], [3, 4, 6, 7]]], CLUSTER)
    part = uneven.batch.of_rank(0)
    assert part.lengths.tolist() == [6] and part.micro_batch_of_sequence.tolist() == [0]
    assert uneven.plan.num_micro_batches == 2
    np.testing.assert_array_equal(uneven.batch.of_rank(1).trace.sequence(0), planned.batch.trace.sequence(2))


def test_plan_options_reach_the_planner(routing):
    """With a balance that any plan meets there is nothing to do."""
    lenient = PlanOptions(balance=100.0)
    for planned in (
        verl.plan_for_update(verl_batch(routing), E, CLUSTER, 2, options=lenient),
        slime.plan_for_train(slime_rollout(routing), E, CLUSTER, [[[0, 1, 2, 3]], [[4, 5, 6, 7]]], options=lenient),
    ):
        assert (planned.plan.replicas == -1).all()
        assert (planned.plan.home == np.arange(E) // (E // R)).all()


@pytest.mark.parametrize(
    ("micro_batches", "message"),
    [
        ([[[0, 1, 2, 3, 4, 5, 6, 7]]], "for 1 ranks; the cluster has 2"),
        ([[[0, 1], [2, 3]], [[4, 5, 6, 7]]], r"\[1, 2\] micro-batches"),
        ([[[0, 1, 2, 3]], [[4, 5, 6]]], "leave out sequence 7"),
        ([[[0, 1, 2, 3]], [[3, 4, 5, 6, 7]]], r"micro_batches\[1\]\[0\] has sequence 3"),
        ([[[0, 1, 2, 3]], [[4, 5, 6, 7, 8]]], "has sequence 8"),
    ],
)
def test_sequences_that_are_dealt_out_wrongly(routing, micro_batches, message):
    with pytest.raises(InputError, match=message):
        slime.plan_for_train(slime_rollout(routing), E, CLUSTER, micro_batches)
    with pytest.raises(InputError, match="micro_batch_size_per_gpu is 3; 8 sequences must divide"):
        RoutedBatch.from_verl(verl.trace_of_batch(verl_batch(routing), E), 2, 3)
    with pytest.raises(InputError, match=r"micro_batch_indices_of_rank\[1\] has 4; it must lie in 0..3"):
        slime.plan_for_train(
            slime_rollout(routing),
            E,
            CLUSTER,
            [[[0, 1, 2, 3]], [[1, 2, 3, 4]]],
            partition_of_rank=[[0, 2, 4, 6], [1, 3, 5, 7]],
        )


def as_verl_deals(sequences, ranks, mini, micro, epochs):
    """As verl's workers do it: a chunk a rank, split into mini-batches, those into micro-batches; [steps][rank][m]."""
    chunks = torch.arange(sequences).chunk(ranks)
    steps = []
    for _ in range(epochs):
        per_rank = [[part.split(micro) for part in chunk.split(mini)] for chunk in chunks]
        steps += [[[m.tolist() for m in rank] for rank in step] for step in zip(*per_rank, strict=True)]
    return steps


@pytest.mark.parametrize(("mini", "micro", "epochs"), [(2, 1, 1), (2, 2, 3), (4, 2, 2), (1, 1, 1)])
def test_verl_has_a_plan_for_every_mini_batch_of_every_epoch(routing, mini, micro, epochs):
    trace = verl.trace_of_batch(verl_batch(routing), E)
    steps = list(verl.plan_mini_batches(trace, CLUSTER, mini, micro, epochs=epochs, options=LEVEL))
    expected = as_verl_deals(len(routing), R, mini, micro, epochs)
    assert len(steps) == len(expected) == epochs * 4 // mini
    home = None
    for (rows, planned), dealt in zip(steps, expected, strict=True):
        for rank, m in np.ndindex(R, mini // micro):
            assert rows[planned.batch.sequences(m, rank)].tolist() == dealt[rank][m]
        np.testing.assert_array_equal(planned.loads, planned.batch.loads())
        again = plan_micro_batches(
            trace.select(rows), [[[rows.tolist().index(i) for i in m] for m in rank] for rank in dealt], CLUSTER,
            previous_home=home, options=LEVEL,
        )  # fmt: skip
        np.testing.assert_array_equal(planned.plan.home, again.plan.home)
        np.testing.assert_array_equal(planned.plan.replicas, again.plan.replicas)
        home = planned.plan.home


@pytest.mark.parametrize(
    ("mini", "micro", "epochs", "message"),
    [
        (3, 1, 1, "mini_batch_size_per_gpu is 3, but must divide 4: 8 sequences over 2 ranks"),
        (2, 0, 1, "micro_batch_size_per_gpu is 0, but must divide 2"),
        (4, 3, 1, "micro_batch_size_per_gpu is 3, but must divide 4"),
        (4, 2, 0, "epochs is 0, but must be at least 1"),
    ],
)
def test_mini_batches_that_do_not_divide_are_refused(routing, mini, micro, epochs, message):
    trace = verl.trace_of_batch(verl_batch(routing), E)
    with pytest.raises(InputError, match=message):
        next(verl.plan_mini_batches(trace, CLUSTER, mini, micro, epochs=epochs))


def test_verl_batch_without_padding_keeps_its_padded_masks(routing):
    """verl makes ids and routing jagged, and leaves `attention_mask` and `response_mask` as they were."""
    batch = verl_batch(routing)
    mask = batch["attention_mask"]
    batch["response_mask"] = mask[:, 6:].clone()
    batch["response_mask"][0, 2], batch["routed_experts"][0, 8] = 0, 0  # a tool result
    padded = verl.trace_of_batch(batch, E)
    unpadded = batch | {
        key: torch.nested.as_nested_tensor(
            [row[real.bool()] for row, real in zip(batch[key], mask, strict=True)], layout=torch.jagged
        )
        for key in ("input_ids", "routed_experts")
    }
    trace = verl.trace_of_batch(unpadded, E)
    assert (trace.reasons == padded.reasons).all() and (trace.expert_ids == padded.expert_ids).all()
    assert trace.unknown.sum() == len(routing) + 1
    with pytest.raises(ShapeError, match="response_mask has shape"):
        verl.trace_of_batch(unpadded | {"attention_mask": None}, E)
    with pytest.raises(InputError, match="needs attention_mask"):
        verl.trace_of_batch({"routed_experts": batch["routed_experts"]}, E)


def test_arguments_that_deal_out_a_batch_are_whole_numbers(routing):
    rollout = slime_rollout(routing)
    halves = [[list(range(4))], [list(range(4, 8))]]
    for wrong in ("ab", None, [[[0.5]], [[1]]], [["0"], [[1]]], [[0], [1]]):
        with pytest.raises(InputError, match="micro_batches"):
            slime.plan_for_train(rollout, E, CLUSTER, wrong)
    for wrong in ("ab", [[0.5], [1]]):
        with pytest.raises(InputError, match="partition_of_rank"):
            slime.plan_for_train(rollout, E, CLUSTER, [[[0]], [[0]]], partition_of_rank=wrong)
    for wrong in ("2", None, 2.0):
        with pytest.raises(InputError, match="micro_batch_size_per_gpu is"):
            verl.plan_for_update(verl_batch(routing), E, CLUSTER, wrong)
    for key, wrong in (("loss_masks", [[1, 1]]), ("loss_masks", 5), ("tokens", [5] * 8), ("tokens", None)):
        with pytest.raises(InputError):
            slime.plan_for_train(rollout | {key: wrong}, E, CLUSTER, halves)
    with pytest.raises(ShapeError, match="response_mask has 99 tokens"):
        slime.plan_for_train(rollout | {"loss_masks": [torch.ones(99)] * 8}, E, CLUSTER, halves)


def test_rows_layers_and_ranks_of_a_trace_are_whole_numbers_within_it(routing):
    trace = slime.trace_of_rollout(slime_rollout(routing), E)
    for wrong in ("a", [1.5], [9]):
        with pytest.raises(InputError, match="layers is"):
            megatron.replay_targets(trace, layers=wrong)
    for rank, size in (("a", 2), (0.5, 2), (2, 2), (0, 0)):
        with pytest.raises(InputError, match="rank is"):
            TokenShare(rank, size)
    for wrong in ([0.5], [trace.num_tokens], [-2]):  # the last would be a row counted from the end
        with pytest.raises(InputError, match="rows"):
            trace.rows(wrong)
