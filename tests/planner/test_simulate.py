"""Rivals keep every assignment and do what their authors say; workloads keep their word; ours comes out ahead."""

from dataclasses import replace

import numpy as np
import pytest
from skewed_loads import skewed_loads

from relibra_kernels.planner import (
    MODELS,
    ClusterSpec,
    InputError,
    PlanOptions,
    PolicyError,
    Scenario,
    count_loads,
    generate_loads,
    generate_trace,
    plan_batch,
    simulate,
    static_plan,
)
from relibra_kernels.planner.plan import rank_loads
from relibra_kernels.planner.simulation.baselines import BASELINES
from relibra_kernels.planner.simulation.baselines.eplb import pack
from relibra_kernels.planner.simulation.generator import hottest_change
from relibra_kernels.planner.simulation.simulate import POLICIES
from relibra_kernels.planner.simulation.workloads import WORKLOADS, workload
from relibra_kernels.planner.solver import search, solution
from relibra_kernels.planner.solver.relaxed import whole_split


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("nodes", "gpus", "experts"), [(2, 4, 16), (1, 8, 32), (3, 3, 18), (4, 1, 8)])
def test_rivals_conserve_assignments(name, nodes, gpus, experts):
    loads = skewed_loads(2, 3, experts)
    loads[0, 1] = 0
    outcome = BASELINES[name](loads, ClusterSpec(nodes, gpus))
    np.testing.assert_array_equal(outcome.rank_load.sum(2), loads.sum(2))
    assert outcome.slot_load.min() >= 0
    for kind in ("pushed", "far", "moved"):
        assert getattr(outcome, f"{kind}_in").sum() == getattr(outcome, f"{kind}_out").sum()


def test_eplb_packs_its_regression_case():
    """The published case: two experts a GPU on 8 GPUs; copies of the hot ones, heaviest first to the lightest."""
    loads = np.array([[[600, 560, 120, 120, 20, 10, 10, 10]]])
    assert BASELINES["eplb-global"](loads, ClusterSpec(1, 8, 1)).rank_load.max() == 232
    assert BASELINES["eplb-global-split"](loads, ClusterSpec(1, 8, 1)).rank_load.max() < 232


def test_pack_gives_equal_counts():
    members = pack(np.random.default_rng(0).random((5, 12)), 4)
    assert (np.sort(members.reshape(5, -1), 1) == np.arange(12)).all()


def test_lplb_passes_load_on_along_its_cube():
    """The hot expert's copies reach two ranks, and those hand on their own experts to others."""
    loads = np.full((1, 1, 8), 100)
    loads[0, 0, 3] = 500
    assert BASELINES["lplb"](loads, ClusterSpec(1, 8, 2)).rank_load.max() <= 200
    loads = skewed_loads(4, 8, 64)
    assert np.nanmean(BASELINES["lplb"](loads, ClusterSpec(1, 8, 2)).imbalance()) < 1.05


def test_llep_leaves_even_loads_alone_and_forces_the_rest():
    loads = np.full((1, 2, 16), 5000)
    loads[0, 1, 0] = 50000
    outcome = BASELINES["llep"](loads, ClusterSpec(2, 4))
    moved = (outcome.pushed_in + outcome.far_in).sum(2)
    assert moved[0, 0] == 0
    assert moved[0, 1] > 0
    assert outcome.imbalance()[0, 1] < 1.05


def test_moonep_is_exact_with_less_than_one_replica_a_rank():
    loads = skewed_loads(3, 4, 64)
    outcome = BASELINES["moonep"](loads, ClusterSpec(2, 8))
    np.testing.assert_array_equal(outcome.rank_load.max(2), -(-loads.sum(2) // 16))
    assert (outcome.pushed_in + outcome.far_in).sum(2).max() < 16 * 2
    assert (outcome.slot_load[..., 4:] > 0).sum(3).max() <= 4  # experts of one other rank


def test_moonep_fills_the_roomiest_rank_whole():
    """Rank 0, 5 above the mean, fills rank 3, which takes 10: it has room for 5 then, and rank 1 fills that."""
    loads = np.array([[[13, 12, 15, 10, 10, 10, 6, 4]]])
    outcome = BASELINES["moonep"](loads, ClusterSpec(1, 4))
    np.testing.assert_array_equal(outcome.pushed_out[0, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(outcome.pushed_in[0, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(outcome.rank_load[0, 0], [20, 20, 20, 20])


def test_generated_loads_have_the_published_statistics():
    loads = generate_loads(16, 32, 128, 8, 1 << 18, max_mean=7.3, change=0.18, seed=3)
    assert (loads.max(2) / loads.mean(2)).mean() == pytest.approx(7.3, rel=0.02)
    assert 0.15 <= hottest_change(loads) <= 0.21
    assert loads.max() <= 1 << 18  # at most one assignment a token
    np.testing.assert_allclose(loads.sum(2), 8 << 18, rtol=0.01)
    np.testing.assert_array_equal(loads, generate_loads(16, 32, 128, 8, 1 << 18, max_mean=7.3, change=0.18, seed=3))


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_loads_of_so_many_tokens(name):
    loads = workload(name, 2, 6, 64, 4, 1 << 14, max_mean=6.0, seed=1)
    assert loads.shape == (2, 6, 64)
    assert loads.max() <= 1 << 14
    np.testing.assert_allclose(loads.sum(2), 4 << 14, rtol=0.05)
    np.testing.assert_array_equal(loads, workload(name, 2, 6, 64, 4, 1 << 14, max_mean=6.0, seed=1))
    skew = (loads.max(2) / loads.mean(2)).mean()
    assert {"drift": 5, "zipf": 8, "max-violation": 5, "skewed": 2.5}[name] < skew < 17


def test_generated_traces_are_traces():
    trace = generate_trace(2, 6, 32, 4, 200, max_mean=4, seed=1)
    assert (trace.num_sequences, trace.num_layers, trace.top_k) == (6, 2, 4)
    assert trace.only_last_tokens_unknown
    loads = count_loads(trace, np.arange(6))
    np.testing.assert_array_equal(loads.sum(2), 199 * 4)
    assert 2 < (loads.max(2) / loads.mean(2)).mean() < 6


def test_impossible_skew_is_refused():
    with pytest.raises(InputError, match="max_mean is 16"):
        generate_loads(1, 1, 128, 8, 100, max_mean=16)


@pytest.mark.parametrize(("nodes", "tokens", "copies"), [(2, 8192, 4), (8, 8192, 4), (2, 1024, 4), (2, 8192, 0)])
def test_ours_is_ahead_of_every_rival_that_fits(nodes, tokens, copies):
    model = MODELS["Qwen3-30B-A3B"]
    loads = generate_loads(2, 16, model.experts, model.top_k, tokens * 8 * nodes)
    options = PlanOptions(shape=model, kept_bytes=copies * model.copy_bytes)
    steps = []
    results = simulate(loads, Scenario(ClusterSpec(nodes, 8, 2), options), progress=steps.append)
    assert tuple(steps) == tuple(results) == POLICIES
    seconds = {name: result.cost.seconds for name, result in results.items()}
    rivals = [name for name in POLICIES if name not in ("relibra", "balanced") and results[name].fits]
    # Without memory for them, rules that host more experts at once than there are slots do not fit either.
    assert "ultraep" in rivals and ("flashlb-split" in rivals) == (copies == 4)
    assert ("llep" in rivals) == (copies == 4 and nodes == 2)
    assert all(seconds["relibra"] <= seconds[name] for name in rivals)
    if copies and tokens == 8192:
        assert seconds["relibra"] < seconds["balanced"]


@pytest.mark.parametrize(
    ("name", "nodes", "tokens", "size", "transport"),
    [
        ("Qwen3-30B-A3B", 1, 1024, 8, "one"),  # each of these was behind a rival once
        ("Qwen3-235B-A22B", 1, 1024, 0, "one"),
        ("gpt-oss-20b", 1, 2048, 0, "one"),
        ("DeepSeek-V3", 2, 1024, 2, "two"),
        ("DeepSeek-V3", 4, 512, 0, "one"),
        ("DeepSeek-V3", 1, 2048, 0, "one"),
    ],
)
def test_ours_is_behind_no_rival_with_few_tokens_or_one_node(name, nodes, tokens, size, transport):
    model = MODELS[name]
    skew = min(7.3, model.experts / model.top_k / 2)
    loads = generate_loads(2, 16, model.experts, model.top_k, tokens * 8 * nodes, max_mean=skew, seed=1 + 8 * nodes)
    kept_bytes = int(size * 1e9 * 2 / model.layers)
    scenario = Scenario(ClusterSpec(nodes, 8), PlanOptions(shape=model, kept_bytes=kept_bytes, transport=transport))
    results = simulate(loads, scenario, [policy for policy in POLICIES if policy != "balanced"])
    ours = results.pop("relibra").cost.seconds
    assert ours <= min(result.cost.seconds for result in results.values() if result.fits) * 1.0005


def test_experts_hosted_at_once_beyond_the_slots_need_memory():
    loads = np.array([[[41, 25, *[1, 0] * 7]]])  # seven ranks take 9 each: the last one what is left of both experts
    outcome = BASELINES["moonep"](loads, ClusterSpec(1, 8, 1))
    hosted = (outcome.slot_load[..., 2:] > 0).sum(3).max((0, 1))
    assert hosted.max() == 2
    np.testing.assert_array_equal(outcome.kept_copies, np.maximum(hosted - 1, 0))
    assert not BASELINES["ultraep"](loads, ClusterSpec(1, 8, 1)).kept_copies.any()


def test_few_kept_replicas_level_nodes():
    """An eighth of a copy a rank and layer, chosen to level nodes, does what moving 80 experts a layer does without."""
    model = MODELS["Qwen3-235B-A22B"]
    loads = generate_loads(8, 16, model.experts, model.top_k, 8192 * 64, seed=5)
    options = PlanOptions(shape=model, kept_bytes=int(2.5e9 * 8 / model.layers))
    cluster = ClusterSpec(8, 8)
    plan = plan_batch(loads, cluster, options=options)
    nodes = rank_loads(loads, plan.home, plan.replicas, plan.quota).reshape(8, 16, 8, 8).sum(3)
    assert (nodes.max(2) / nodes.mean(2)).mean() < 1.016
    assert (plan.home != static_plan(loads, cluster).home).sum() < 8 * 10
    assert plan.kept.sum((0, 2)).max() <= options.kept_copies


def test_small_batches_are_not_drowned_in_weights():
    """With a few tokens a rank, weights cost more than they bring: the plan must see that."""
    model = MODELS["Qwen3-30B-A3B"]
    loads = generate_loads(2, 4, model.experts, model.top_k, 64 * 16)
    scenario = Scenario(ClusterSpec(2, 8, 2), PlanOptions(shape=model))
    results = simulate(loads, scenario, ["static", "relibra"])
    assert results["relibra"].cost.seconds <= results["static"].cost.seconds
    assert results["relibra"].fetched < 5


def test_a_layer_takes_another_plan_where_the_sample_was_wrong(monkeypatch):
    model = MODELS["Qwen3-30B-A3B"]
    loads = generate_loads(8, 8, model.experts, model.top_k, 1024 * 16, seed=1)
    scenario = Scenario(ClusterSpec(2, 8), PlanOptions(shape=model, kept_bytes=int(0.3e9 * 8 / model.layers)))
    mixed = simulate(loads, scenario, ["relibra"])["relibra"].cost.seconds
    monkeypatch.setattr(search, "_put_others", lambda *_: None)
    assert mixed < 0.998 * simulate(loads, scenario, ["relibra"])["relibra"].cost.seconds


_fetch_singly, _members = search._fetch_singly, search._members
_WITHOUT = {
    "UltraEP's rule": (
        search,
        "_fetch_singly",
        lambda *args: _fetch_singly(*args[:-1], [way for way in args[-1] if not way[2]]),
    ),
    "replicas that level nodes": (search, "_members", lambda to_plan: [m for m in _members(to_plan) if not m.by_node]),
    "swaps of homes": (search, "_members", lambda to_plan: [m for m in _members(to_plan) if not m.swaps]),
    "exact splits over nodes": (
        solution,
        "_level_nodes",
        lambda hosts, split, load, *_: whole_split(hosts, split, load),
    ),
}


@pytest.mark.parametrize(
    ("part", "name", "nodes", "tokens", "size", "max_moves", "gain"),
    [
        ("UltraEP's rule", "DeepSeek-V3", 1, 2048, 0, None, 0.004),
        ("replicas that level nodes", "Qwen3-235B-A22B", 4, 8192, 2.5, 0, 0.015),
        ("swaps of homes", "Qwen3-235B-A22B", 2, 32768, 2.2, None, 0.003),
        ("exact splits over nodes", "DeepSeek-V3", 8, 32768, 2.2, None, 0.0025),
    ],
)
def test_every_part_of_the_search_saves_time(part, name, nodes, tokens, size, max_moves, gain, monkeypatch):
    model = MODELS[name]
    layers = 2 if nodes == 1 else 8
    loads = generate_loads(layers, 16 if nodes == 1 else 8, model.experts, model.top_k, tokens * 8 * nodes, seed=3)
    options = PlanOptions(shape=model, kept_bytes=int(size * 1e9 * layers / model.layers), max_moves=max_moves)
    scenario = Scenario(ClusterSpec(nodes, 8), options)
    whole = simulate(loads, scenario, ["relibra"])["relibra"].cost.seconds
    monkeypatch.setattr(*_WITHOUT[part])
    assert whole < (1 - gain) * simulate(loads, scenario, ["relibra"])["relibra"].cost.seconds


def test_slots_are_left_for_fetched_replicas_where_hot_experts_change(monkeypatch):
    """There is memory for a kept replica in every slot. A new hot expert in every micro-batch is better fetched."""
    model = MODELS["Qwen3-30B-A3B"]
    loads = workload("max-violation", 4, 16, model.experts, model.top_k, 32768 * 64, seed=3)
    options = PlanOptions(shape=model, kept_bytes=int(8e9 * 4 / model.layers))
    scenario = Scenario(ClusterSpec(8, 8), options)
    found = simulate(loads, scenario, ["relibra", "balanced"])
    whole = found["relibra"].cost.seconds
    assert whole < 1.005 * found["balanced"].cost.seconds
    assert found["relibra"].moved == 0
    monkeypatch.setattr(search, "_levelling_nodes", lambda *_: [])
    assert whole < 0.99 * simulate(loads, scenario, ["relibra"])["relibra"].cost.seconds


@pytest.mark.parametrize(
    "broken",
    [
        lambda outcome: replace(outcome, slot_load=outcome.slot_load[..., 0]),
        lambda outcome: replace(outcome, slot_load=outcome.slot_load.tolist()),
        lambda outcome: replace(outcome, pushed_in=np.zeros((3, 3), np.int64)),
        lambda outcome: replace(outcome, kept_copies=None),
    ],
)
def test_an_outcome_that_cannot_be_priced_is_its_policys_failure(broken):
    others = {"mine": lambda loads, cluster: broken(BASELINES["static"](loads, cluster))}
    with pytest.raises(PolicyError, match="policy 'mine' failed: "):
        simulate(skewed_loads(2, 3, 16), Scenario(ClusterSpec(1, 8), PlanOptions()), ["mine"], others=others)


def test_unknown_policies_are_refused():
    with pytest.raises(InputError, match="policy is 'magic', but must be one of static"):
        simulate(skewed_loads(1, 1, 128), Scenario(ClusterSpec(1, 8), PlanOptions()), ["magic"])


def test_the_model_comes_near_published_figures():
    """UltraEP reports 94.3 % of balanced, in one domain of 64 ranks; ReLibra 90-94 %. See docs/simulator.md."""
    shape = MODELS["Qwen3-30B-A3B"]
    loads = generate_loads(2, 8, 128, 8, 4096 * 64)
    options = PlanOptions(shape=shape)
    one_domain = Scenario(ClusterSpec(1, 64, 2), replace(options, kept_bytes=0))
    results = simulate(loads, one_domain, ["ultraep", "balanced"])
    assert 0.90 <= results["balanced"].cost.seconds / results["ultraep"].cost.seconds <= 0.99
