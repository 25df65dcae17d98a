"""What travels is what the cost model says: tokens, replicas fetched and kept, and migration, on emulated clusters."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from ep_wire import count_wire
from toy_training import Case, make_batch

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.planner import (
    ModelShape,
    destinations,
    outcome_of_plan,
    replica_bytes,
    split_of_source,
)

CASE = Case(
    ranks=4,
    gpus_per_node=2,
    experts=16,
    hidden=16,
    intermediate=8,
    dtype=torch.bfloat16,
    micro_batches=2,
    sequence_lengths=(30,) * 16,
)


def model_shape(case: Case) -> ModelShape:
    sizes = case.layers, case.experts, case.top_k, case.hidden, case.intermediate, 1, 1, 1
    return ModelShape("toy", *sizes, parameter_bytes=case.dtype.itemsize)


def rows_between_ranks(case: Case, plan, loads, together: int = 1) -> np.ndarray:
    """int64 [L, M, R, R / together]: distinct rows from each source to each rank, from the trace and the splits alone.

    Args:
        together: ranks that a row goes to once.
    """
    trace, groups, _ = make_batch(case, 0)
    rows = np.zeros((case.layers, case.micro_batches, case.ranks, case.ranks // together), np.int64)
    for m, source in np.ndindex(case.micro_batches, case.ranks):
        sequences = np.flatnonzero((groups == m) & (np.arange(len(groups)) % case.ranks == source))
        ids = trace.select(sequences).expert_ids
        for layer in range(case.layers):
            split = split_of_source(plan, loads, layer, m, source)
            there = destinations(ids[:, layer], split)
            visited = np.where(there < 0, -1, there // together)
            for row in visited:  # a token goes to each of them once
                rows[layer, m, source, list({*row} - {-1})] += 1
    return rows


def rows_on_networks(case: Case, plan, loads) -> dict[str, int]:
    """Rows of one exchange inside nodes and between them, over all layers and micro-batches."""
    rows = rows_between_ranks(case, plan, loads)
    rank = np.arange(case.ranks)
    node, place = rank // case.gpus_per_node, rank % case.gpus_per_node
    far = node[:, None] != node
    if case.options.transport == "one":
        return {"fast": int((rows * (~far & ~np.eye(case.ranks, dtype=bool))).sum()), "slow": int((rows * far).sum())}
    crossing = rows_between_ranks(case, plan, loads, case.gpus_per_node)
    handed_on = rows * (place[:, None] != place)  # by the rank of the sender's place, on every node
    abroad = node[:, None] != np.arange(case.ranks // case.gpus_per_node)
    return {"fast": int(handed_on.sum()), "slow": int((crossing * abroad).sum())}


def test_parameters_in_fp32_are_priced_as_what_they_take(ranks):
    case = replace(CASE, dtype=torch.float32)
    results, model = ranks(4).run(count_wire, case), model_shape(case)
    estimate, outcome = (results[0]["estimate"], outcome_of_plan(results[0]["plan"], results[0]["loads"]))
    assert model.expert_bytes == 2 * model_shape(CASE).expert_bytes
    assert estimate.home_weights_bytes == case.layers * case.experts // 4 * model.expert_bytes
    sent = sum((Counter(result["sent"]) for result in results), Counter())
    assert (
        sum(sent["kept_weights", net] for net in ("fast", "slow")) == outcome.kept_copies.sum() * model.expert_bytes > 0
    )
    assert estimate.kept_bytes == outcome.kept_copies.max() * model.copy_bytes


@pytest.mark.parametrize("transport", ["one", "two"])
@pytest.mark.parametrize(("size", "keep"), [(4, False), (4, True), (8, False)])
def test_bytes_are_what_cost_predicts(ranks, size, keep, transport):
    options = RuntimeOptions(keep_replicas=keep, transport=transport)
    case = replace(CASE, ranks=size, gpus_per_node=size // 2, options=options)
    results = ranks(size).run(count_wire, case)
    plan, loads, previous = (results[0][name] for name in ("plan", "loads", "previous"))
    outcome, model = outcome_of_plan(plan, loads, previous), model_shape(case)
    assert outcome.pushed_in.sum() > 0 and outcome.kept_in.sum() > 0 and outcome.moved_in.sum() > 0

    sent: Counter[tuple[str, str]] = Counter()
    for result in results:
        sent.update(result["sent"])
        scalars = result["stats"].scalars()
        for net in ("fast", "slow"):  # nothing goes past the ledger, or is lost on its way to the statistics
            assert sum(count for (_, n), count in result["sent"].items() if n == net) == result["wire"].get(net, 0)
            assert sum(scalars[name] for name in scalars if f"_{net}_" in name) == result["wire"].get(net, 0)

    pairs = case.layers * case.micro_batches
    fast, slow = (round(each * pairs) for each in replica_bytes(outcome, model, keep_replicas=keep))
    kinds = ("replica_weights", "replica_gradients", "kept_weights", "kept_gradients", "migration")
    assert sum(sent[kind, net] for kind in kinds for net in ("fast", "slow")) == fast + slow
    assert sum(sent[kind, "fast"] for kind in kinds[:4]) == fast
    near = sum(sent[kind, "fast"] for kind in kinds[2:4])  # kept ones from a home or a relay of their node
    assert near == outcome.kept_near_in.sum() * model.copy_bytes > 0
    assert sum(sent[kind, "slow"] for kind in kinds[:2]) == 0
    assert sent["replica_weights", "fast"] == (1 if keep else 2) * outcome.pushed_in.sum() * model.expert_bytes
    assert sum(sent["migration", net] for net in ("fast", "slow")) == outcome.moved_in.sum() * model.migration_bytes
    kept = outcome.kept_in.sum()
    assert sent["kept_weights", "slow"] == kept * model.expert_bytes
    assert sent["kept_gradients", "slow"] == kept * model.gradient_bytes

    estimate = results[0]["estimate"]  # made before the batch ran
    assert all(result["estimate"] == estimate for result in results)
    assert sum(sent[kind, net] for kind in kinds[:2] for net in ("fast", "slow")) == estimate.fetched_fast_bytes
    for name in ("fetched_fast_bytes", "kept_fast_bytes", "kept_slow_bytes"):  # statistics have the names of estimates
        assert sum(getattr(result["stats"], name) for result in results) == getattr(estimate, name)
    assert sum(sent[kind, "fast"] for kind in kinds[2:4]) == estimate.kept_fast_bytes
    assert sum(sent[kind, "slow"] for kind in kinds[2:4]) == estimate.kept_slow_bytes
    assert sum(sent["migration", net] for net in ("fast", "slow")) == estimate.migration_bytes
    assert results[0]["unplanned"].static_seconds == estimate.static_seconds
    assert results[0]["unplanned"].planned_seconds <= estimate.planned_seconds  # that of `ep.plan`

    for net, count in rows_on_networks(case, plan, loads).items():
        row, gates, slots = 2 * case.hidden, 4 * case.top_k, 2 * case.top_k  # bf16, fp32, int16
        for kind, size in (
            ("dispatch", row + gates + slots),
            ("combine", row),
            ("backward dispatch", row),
            ("backward combine", row + gates),
        ):
            assert sent[kind, net] == count * -(-size // 16) * 16


def test_bytes_of_the_planners_own_plan_are_what_estimate_says(ranks):
    results = ranks(4).run(count_wire, CASE, False)
    estimate = results[0]["estimate"]
    sent: Counter[tuple[str, str]] = Counter()
    for result in results:
        sent.update(result["sent"])
    replicas = {
        net: sum(sent[f"{kind}_{part}", net] for kind in ("kept", "replica") for part in ("weights", "gradients"))
        for net in ("fast", "slow")
    }
    assert replicas["fast"] == estimate.fetched_fast_bytes + estimate.kept_fast_bytes
    assert replicas["slow"] == estimate.kept_slow_bytes > 0
    assert sum(sent["migration", net] for net in ("fast", "slow")) == estimate.migration_bytes
    assert estimate.planned_max_mean < 1.05 < estimate.static_max_mean
