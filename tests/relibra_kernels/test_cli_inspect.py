"""`relibra inspect`: what it says of a trace, a plan and a load table, for people and for programs."""

import json

import numpy as np
import pytest

from relibra_kernels.cli import main
from relibra_kernels.planner import ClusterSpec, PlanOptions, RoutingTrace, from_vllm, plan_batch, static_plan
from relibra_kernels.planner.files import save_npz


@pytest.fixture
def trace(tmp_path):
    ids = np.random.default_rng(0).random((30, 4, 16)).argsort(-1)[..., :2].astype(np.uint8)
    ids[:, 0] = 0
    ids[:, 2] = [3, 5]  # every token chooses the same two
    ids[4, 3] = 0
    made = from_vllm([ids[:20], ids[20:], None], 16, num_tokens=[21, 11, 4], holes="unknown")
    made.save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def inspected(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_trace(trace, capsys):
    text = inspected(capsys, trace)
    assert len(text.splitlines()) <= 24
    for line in ("trace, ", "tokens: 36", "1 (not recorded by the engine)", "3 (sequence without routing)",
                 "layers dropped: 0", "most in layer 2: 8.00"):  # fmt: skip
        assert line in text, text
    found = json.loads(inspected(capsys, trace, "--json"))
    assert found["skew_of_layer"][1] == 8.0 and found["moe_layer_ids"] == [1, 2, 3]
    assert sum(found["unknown_tokens"].values()) == RoutingTrace.load(trace).unknown.sum() == 7
    assert found["bytes_on_disk"] == trace.stat().st_size
    assert found["bytes_in_memory"] == 36 * (3 * 2 + 1) + 4 * 8  # a byte an id, one a token


def test_a_plan_and_its_loads(tmp_path, capsys):
    loads = np.random.default_rng(0).integers(0, 90, (2, 3, 16)).astype(np.int32)
    plan = plan_batch(loads, ClusterSpec(1, 4, 2))
    plan.save(tmp_path / "plan.npz")
    save_npz(tmp_path / "loads.npz", loads=loads)
    found = json.loads(inspected(capsys, tmp_path / "plan.npz", "--loads", tmp_path / "loads.npz", "--json"))
    assert found["imbalance_mean"] == plan.imbalance_mean(loads)
    assert found["kept_replicas"] == plan.kept.sum() and found["assignments_at_replicas"] == plan.quota.sum()
    text = inspected(capsys, tmp_path / "plan.npz", "--shape", "Qwen3-235B-A22B", "--previous", tmp_path / "plan.npz")
    assert "experts moved: 0" in text and "migration bytes: 0 B" in text and len(text.splitlines()) <= 24
    found = json.loads(inspected(capsys, tmp_path / "loads.npz", "--json"))
    assert found["kind"] == "load table" and found["assignments"] == loads.sum()
    np.testing.assert_allclose(found["skew_of_layer"], loads.sum(1).max(1) / loads.sum(1).mean(1))


def test_two_plans_side_by_side(tmp_path, capsys):
    loads = np.random.default_rng(0).integers(0, 90, (2, 3, 16)).astype(np.int32)
    static_plan(loads, ClusterSpec(1, 4, 2)).save(tmp_path / "a.npz")
    plan_batch(loads, ClusterSpec(1, 4, 2), options=PlanOptions(balance=1.0)).save(tmp_path / "b.npz")
    static_plan(loads, ClusterSpec(1, 8, 2)).save(tmp_path / "c.npz")
    save_npz(tmp_path / "loads.npz", loads=loads)
    both = tmp_path / "a.npz", tmp_path / "b.npz", "--loads", tmp_path / "loads.npz"
    found = json.loads(inspected(capsys, *both, "--json"))
    assert found["plans"][0]["imbalance_mean"] > found["plans"][1]["imbalance_mean"] and not found["same_replicas"]
    text = inspected(capsys, *both)
    assert "imbalance mean" in text and "homes that differ: " in text
    assert main(["inspect", str(tmp_path / "a.npz"), str(tmp_path / "c.npz")]) == 2
    assert "they must be alike" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path, trace, capsys):
    save_npz(tmp_path / "other.npz", other=np.zeros(2))
    for arguments, message in (
        ((tmp_path / "other.npz",), "is no trace, plan or load table"),
        ((tmp_path / "none.npz",), "no such file"),
        ((trace, "--shape", "Mixtral-8x7B"), "--shape are for a plan"),
    ):
        assert main(["inspect", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
