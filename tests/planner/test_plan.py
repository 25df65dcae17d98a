"""BatchPlan: its rules, its files, its figures."""

import numpy as np
import pytest

from relibra_kernels.planner import (
    BatchPlan,
    ClusterSpec,
    FormatError,
    InputError,
    PlanError,
    ShapeError,
    plan_batch,
    static_plan,
)

LOADS = np.random.default_rng(0).integers(10, 100, (2, 3, 8))


def parts(**change):
    """A plan over 2 nodes x 2 ranks with 2 slots: expert 0 (home rank 0) on rank 1, expert 4 kept on rank 0."""
    home = np.tile(np.arange(8) // 2, (2, 1))
    replicas = np.full((2, 3, 4, 2), -1)
    quota = np.zeros((2, 3, 4, 2), int)
    kept = np.zeros((2, 4, 2), bool)
    replicas[0, 1, 1, 0], quota[0, 1, 1, 0] = 0, 5
    replicas[1, :, 0, 1], quota[1, :, 0, 1], kept[1, 0, 1] = 4, (3, 0, 2), True
    values = {"home": home, "replicas": replicas, "quota": quota, "kept": kept, "gpus_per_node": 2, "loads": LOADS}
    for name, (where, value) in change.items():
        values[name] = values[name].copy()
        values[name][where] = value
    return values


def test_properties():
    plan = BatchPlan(**parts())
    assert (plan.num_layers, plan.num_micro_batches, plan.num_ranks, plan.num_slots) == (2, 3, 4, 2)
    assert (plan.num_experts, plan.home_slots) == (8, 2)
    assert plan.home_experts(0).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert plan.has_replicas(0, 1)
    assert not plan.has_replicas(0, 0)
    loads = plan.rank_loads(LOADS)
    assert loads[0, 1, 0] == LOADS[0, 1, :2].sum() - 5
    assert loads[0, 1, 1] == LOADS[0, 1, 2:4].sum() + 5
    assert loads[1, 2, 2] == LOADS[1, 2, 4:6].sum() - 2
    np.testing.assert_array_equal(loads.sum(2), LOADS.sum(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"home": ((0, 0), 1)}, "rank 0 is home to 1 experts of layer 0"),
        ({"home": ((0, 0), 4)}, "must be 0 to 3"),
        ({"replicas": ((0, 1, 1, 0), 2)}, "layer 0, micro-batch 1, rank 1, slot 0 holds a replica .* owns"),
        ({"replicas": ((0, 1, 1, 0), 5)}, "rank 1, slot 0 is fetched, but its expert has neither its home nor a kept"),
        ({"replicas": ((0, 1, 1, 0), 8)}, "names expert 8"),
        ({"replicas": ((0, 1, 1, 1), 0)}, "holds one expert twice"),
        ({"replicas": ((1, 1, 0, 1), 5)}, "changes its expert"),
        ({"replicas": ((1, 1, 0, 1), -1)}, "changes its expert"),
        ({"kept": ((1, 0, 1), False)}, "is fetched, but"),
        ({"quota": ((0, 1, 1, 0), -1)}, "quota"),
        ({"quota": ((0, 1, 1, 1), 1)}, "quota"),
        ({"quota": ((0, 1, 1, 0), 10_000)}, "expert 0 in layer 0, micro-batch 1 take"),
    ],
)
def test_every_rule_is_checked(change, message):
    with pytest.raises(PlanError, match=message):
        BatchPlan(**parts(**change))


def test_shapes_are_checked():
    with pytest.raises(PlanError, match="gpus_per_node"):
        BatchPlan(**{**parts(), "gpus_per_node": 3})
    with pytest.raises(PlanError, match="float64"):
        BatchPlan(**{**parts(), "home": parts()["home"].astype(float)})
    with pytest.raises(PlanError, match="quota"):
        BatchPlan(**{**parts(), "quota": parts()["quota"][:, :1]})
    with pytest.raises(ShapeError, match="loads has"):
        BatchPlan(**{**parts(), "loads": LOADS[:1]})


def test_quotas_of_one_expert_are_added_up():
    values = parts(replicas=((0, 1, 1, 0), 0))
    values["kept"][0, 2, 0] = True
    values["replicas"][0, :, 2, 0] = 0
    values["quota"][0, 1, 2, 0] = LOADS[0, 1, 0] - 5
    BatchPlan(**values)
    values["quota"][0, 1, 2, 0] += 1
    with pytest.raises(PlanError, match="take 1 assignments more"):
        BatchPlan(**values)


def test_save_and_load(tmp_path):
    plan = BatchPlan(**parts(), model="tiny")
    plan.save(tmp_path / "plan")  # exactly this name: numpy would add .npz
    again = BatchPlan.load(tmp_path / "plan", loads=LOADS, model="tiny")
    for name in ("home", "replicas", "quota", "kept"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plan, name))
    assert (again.gpus_per_node, again.loads_sha256, again.model) == (2, plan.loads_sha256, "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_plan_for_something_else_is_refused(tmp_path):
    BatchPlan(**parts(), model="tiny").save(tmp_path / "plan.npz")
    with pytest.raises(PlanError, match=r"plan\.npz: .*'tiny', not 'other'"):
        BatchPlan.load(tmp_path / "plan.npz", model="other")
    with pytest.raises(PlanError, match=r"plan\.npz: .*other loads"):
        BatchPlan.load(tmp_path / "plan.npz", loads=LOADS + 1)


def test_the_digest_does_not_depend_on_how_sources_are_kept():
    by_source = np.random.default_rng(0).integers(0, 9, (1, 2, 4, 8)).astype(np.int32)
    cluster = ClusterSpec(2, 2)
    assert static_plan(by_source, cluster).loads_sha256 == static_plan(by_source.sum(2), cluster).loads_sha256


@pytest.mark.parametrize("kind", ["missing", "truncated", "pickled", "key", "broken rule", "version"])
def test_bad_files_are_refused(tmp_path, kind):
    path = tmp_path / "bad.npz"
    if kind != "missing":
        BatchPlan(**parts()).save(path)
        with np.load(path) as archive:
            arrays = dict(archive)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickled":
        np.savez(path, **{**arrays, "home": np.array([{}], object)})
    elif kind == "key":
        del arrays["quota"]
        np.savez(path, **arrays)
    elif kind == "broken rule":
        np.savez(path, **{**arrays, "home": arrays["home"][:, ::-1] * 0})
    elif kind == "version":
        np.savez(path, **{**arrays, "format_version": 99})
    with pytest.raises((FormatError, PlanError), match=r"bad\.npz"):
        BatchPlan.load(path)


def test_static_plan():
    plan = static_plan(LOADS, ClusterSpec(2, 2))
    assert plan.home[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    per_rank = LOADS.reshape(2, 3, 4, 2).sum(-1)
    np.testing.assert_allclose(plan.imbalance(LOADS), per_rank.max(-1) / per_rank.mean(-1))
    assert plan.imbalance_worst(LOADS) == plan.imbalance(LOADS).max()


def test_micro_batches_without_load_are_left_out():
    loads = LOADS.copy()
    loads[1, 2] = 0
    plan = plan_batch(loads, ClusterSpec(2, 2))
    assert np.isnan(plan.imbalance(loads)[1, 2])
    assert np.isfinite(plan.imbalance_mean(loads))
    assert plan_batch(loads * 0, ClusterSpec(2, 2)).imbalance_mean(loads * 0) == 1.0


def test_a_kept_replica_may_be_on_any_node_and_lends_to_its_node():
    values = parts()
    values["kept"][0, 1, 1], values["replicas"][0, :, 1, 1] = True, 1  # beside its home
    values["replicas"][1, 0, 1, 0] = 4  # fetched from rank 0, which keeps expert 4 of the other node
    plan = BatchPlan(**values)
    assert plan.kept[0, 1, 1]
    assert plan.replicas[1, 0, 1, 0] == 4


def test_files_of_version_1_are_read(tmp_path):
    plan, path = BatchPlan(**parts()), tmp_path / "plan.npz"
    plan.save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    assert arrays["format_version"] == 2
    kept = arrays.pop("kept")
    np.savez(path, **{**arrays, "guests": kept, "format_version": 1})
    np.testing.assert_array_equal(BatchPlan.load(path).kept, plan.kept)
    np.savez(path, **{**arrays, "guests": kept})
    with pytest.raises(FormatError, match="has no array 'kept'"):
        BatchPlan.load(path)


def test_uneven_homes():
    """7 experts over 3 ranks: the first rank has one more, and every rank three home slots."""
    loads = np.random.default_rng(1).integers(1, 50, (2, 3, 7))
    plan = static_plan(loads, ClusterSpec(3, 1))
    assert plan.home[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert (plan.home_slots, plan.home_experts(1).tolist()) == (3, [[0, 1, 2], [3, 4, -1], [5, 6, -1]])
    assert plan.rank_loads(loads)[1, 2].tolist() == [
        loads[1, 2, :3].sum(),
        loads[1, 2, 3:5].sum(),
        loads[1, 2, 5:].sum(),
    ]
    moved = np.tile([2, 0, 1, 1, 0, 1, 2], (2, 1))
    slots = np.full((2, 3, 3, 1), -1)
    other = BatchPlan(moved, slots, slots * 0, np.zeros((2, 3, 1), bool), gpus_per_node=1, loads=loads)
    assert other.home_experts(0).tolist() == [[1, 4, -1], [2, 3, 5], [0, 6, -1]]
    with pytest.raises(
        PlanError, match="rank 0 is home to 1 experts of layer 0, but every rank must be home to 2 or 3"
    ):
        BatchPlan(np.tile([0, 1, 1, 1, 2, 2, 2], (2, 1)), slots, slots * 0, np.zeros((2, 3, 1), bool), gpus_per_node=1)
    with pytest.raises(InputError, match="2 experts are fewer than the 3 ranks"):
        static_plan(loads[..., :2], ClusterSpec(3, 1))
