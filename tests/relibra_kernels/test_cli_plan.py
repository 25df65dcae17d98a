"""`relibra plan`, as a user starts it."""

import json
import subprocess
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import pytest

from relibra_kernels.cli import main
from relibra_kernels.planner import BatchPlan, ClusterSpec, InputError, PlanOptions, estimate_plan, find_model

CLUSTER = ["--nodes", "2", "--gpus-per-node", "2", "--replica-slots", "2"]


@pytest.fixture
def loads(tmp_path):
    table = np.random.default_rng(0).integers(0, 100, (2, 3, 8)).astype(np.int32)
    np.savez(tmp_path / "loads.npz", loads=table)
    return table


def make_trace(path, **change):
    ids = np.random.default_rng(0).random((20, 2, 8)).argsort(-1)[..., :2].astype(np.int8)
    arrays = {"expert_ids": ids, "offsets": np.array([0, 6, 12, 20]), "num_experts": 8, **change}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return ids


def run(tmp_path, *arguments):
    return main(["plan", *map(str, arguments), *CLUSTER, "--out", str(tmp_path / "plan.npz")])


def test_plan_from_loads(tmp_path, loads, capsys):
    assert run(tmp_path, tmp_path / "loads.npz", "--json", "--model", "tiny") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    plan = BatchPlan.load(tmp_path / "plan.npz", loads=loads, model="tiny")
    assert report["imbalance_mean"] == pytest.approx(plan.imbalance_mean(loads))
    assert report["imbalance_worst"] == pytest.approx(plan.imbalance_worst(loads))
    assert report["plan_seconds"] > 0


def test_without_json_the_output_is_for_people(tmp_path, loads, capsys):
    assert run(tmp_path, tmp_path / "loads.npz") == 0
    out = capsys.readouterr().out
    assert "max/mean" in out
    assert "{" not in out


def test_plan_from_loads_by_source(tmp_path):
    table = np.random.default_rng(0).integers(0, 100, (2, 3, 4, 8))
    np.savez(tmp_path / "loads.npz", loads=table)
    assert run(tmp_path, tmp_path / "loads.npz", "--save-loads", tmp_path / "again.npz") == 0
    BatchPlan.load(tmp_path / "plan.npz", loads=table.sum(2))
    with np.load(tmp_path / "again.npz") as file:
        np.testing.assert_array_equal(file["loads"], table)


def test_plan_from_a_trace(tmp_path):
    ids = make_trace(tmp_path / "trace.npz")
    arguments = ["--micro-batch-sequences", 2, "--save-loads", tmp_path / "loads.npz"]
    assert run(tmp_path, tmp_path / "trace.npz", *arguments) == 0
    with np.load(tmp_path / "loads.npz") as file:
        table = file["loads"]
    assert table.shape == (2, 2, 8)  # the last micro-batch has one sequence
    np.testing.assert_array_equal(table[1, 1], np.bincount(ids[12:, 1].ravel(), minlength=8))
    BatchPlan.load(tmp_path / "plan.npz", loads=table)


def test_num_experts_for_a_trace_that_does_not_say(tmp_path, capsys):
    make_trace(tmp_path / "trace.npz", num_experts=None)
    assert run(tmp_path, tmp_path / "trace.npz", "--micro-batch-sequences", 2) == 2
    assert "num_experts" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "trace.npz", "--micro-batch-sequences", 2, "--num-experts", 8) == 0


def test_the_previous_plan_must_fit(tmp_path, loads, capsys):
    assert run(tmp_path, tmp_path / "loads.npz", "--model", "tiny") == 0
    (tmp_path / "plan.npz").rename(tmp_path / "before.npz")
    arguments = [tmp_path / "loads.npz", "--previous", tmp_path / "before.npz"]
    assert run(tmp_path, *arguments, "--model", "tiny") == 0
    assert run(tmp_path, *arguments) == 0
    assert run(tmp_path, *arguments, "--model", "other") == 2
    assert "before.npz" in capsys.readouterr().err


BAD = {
    "missing file": lambda path: None,
    "truncated": lambda path: (np.savez(path, loads=np.ones((1, 1, 8), int)), path.write_bytes(path.read_bytes()[:60])),
    "pickled": lambda path: np.savez(path, loads=np.array([{}], object)),
    "text": lambda path: path.write_text("loads"),
    "neither": lambda path: np.savez(path, load=np.ones((1, 1, 8), int)),
    "negative": lambda path: np.savez(path, loads=-np.ones((1, 1, 8), int)),
    "not integer": lambda path: np.savez(path, loads=np.ones((1, 1, 8))),
    "shape": lambda path: np.savez(path, loads=np.ones((1, 8), int)),
    "fewer experts than ranks": lambda path: np.savez(path, loads=np.ones((1, 1, 3), int)),
    "trace without micro-batches": make_trace,
    "ids out of range": lambda path: make_trace(path, num_experts=3),
    "duplicates": lambda path: make_trace(path, expert_ids=np.zeros((20, 2, 2), np.int8)),
    "length": lambda path: make_trace(path, offsets=np.array([0, 6, 12, 19])),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, kind):
    path = tmp_path / "input.npz"
    BAD[kind](path)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "relibra_kernels", "plan", str(path), *CLUSTER, "--out", str(tmp_path / "p.npz")]
    command += ["--save-loads", str(tmp_path / "l.npz")]
    if "trace" not in kind and kind in ("ids out of range", "duplicates", "length"):
        command += ["--micro-batch-sequences", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("relibra plan: error: ")
    assert ("input.npz" in done.stderr) or "3 experts are fewer than the 4 ranks" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_previous_plan_for_other_experts_is_refused(tmp_path, loads, capsys):
    assert run(tmp_path, tmp_path / "loads.npz") == 0
    (tmp_path / "plan.npz").rename(tmp_path / "before.npz")
    np.savez(tmp_path / "loads.npz", loads=loads[:1])
    assert run(tmp_path, tmp_path / "loads.npz", "--previous", tmp_path / "before.npz") == 2
    assert "before.npz is for [layers, experts, ranks] (2, 8" in capsys.readouterr().err


def test_json_reports_what_a_plan_costs(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "skewed.npz", loads=(np.exp(rng.normal(0, 1.5, (2, 4, 32))) * 9000).astype(np.int64))
    reports = []
    for more in (["--kept-bytes", "0", "--max-moves", "0"], ["--kept-bytes", "4e9", "--fetched-slots", "0"]):
        arguments = ["--balance", "1", "--shape", "GLM-4.5-air", "--json", *more]
        assert run(tmp_path, tmp_path / "skewed.npz", *arguments) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    fetched, kept = reports
    assert fetched["replicas_mean"] > 0 == fetched["kept_mean"] == fetched["kept_bytes_worst"] == fetched["moves_mean"]
    assert kept["kept_mean"] > 0 == kept["replicas_mean"] == kept["busiest_sender_mean"]
    assert 0 < kept["kept_bytes_worst"] <= 4e9
    assert 0 < fetched["busiest_sender_mean"] <= fetched["replicas_mean"]
    assert kept["local_share"] > fetched["local_share"] > 0
    assert all(report["modelled_over_balanced"] > 0.5 for report in reports)
    assert all(report["shape"] == "GLM-4.5-Air" and report["migration_bytes"] >= 0 for report in reports)


def test_two_hops_are_compared_with_balance_over_two_hops_and_over_one(tmp_path, capsys):
    """Between nodes a token travels once instead of up to top-k times, so that balance itself is faster."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "skewed.npz", loads=(np.exp(rng.normal(0, 1.5, (2, 4, 64))) * 9000).astype(np.int64))
    ratios = {}
    for transport in ("one", "two"):
        arguments = ["--shape", "Qwen3-30B-A3B", "--transport", transport, "--json"]
        assert run(tmp_path, tmp_path / "skewed.npz", *arguments) == 0
        out = capsys.readouterr().out
        assert ("of it with one hop" in out) == (transport == "two")
        report = json.loads(out.splitlines()[-1])
        ratios[transport] = [report["modelled_over_balanced"], report["modelled_over_one_hop_balanced"]]
    assert ratios["one"][0] == ratios["one"][1]
    assert ratios["two"][1] < 0.95 * ratios["two"][0]
    assert ratios["two"][1] < ratios["one"][1]


def test_a_trace_must_be_of_the_shape_that_is_given(tmp_path, capsys):
    make_trace(tmp_path / "trace.npz")
    arguments = [tmp_path / "trace.npz", "--micro-batch-sequences", 2, "--shape"]
    assert run(tmp_path, *arguments, "64,32,8,4") == 2
    assert "chooses 2 of 8 experts, but 64,32,8,4 chooses 4 of 8" in capsys.readouterr().err
    assert run(tmp_path, *arguments, "64,32,8,2") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--balance", "0.5"], "error: --balance is 0.5"),
        (["--kept-bytes", "-1"], "--kept-bytes is -1"),
        (["--shape", "nope"], "--shape is 'nope'"),
        (["--device", "nope"], "--device is 'nope'"),
        (["--fetched-slots", "-5"], "--fetched-slots is -5"),
        (["--num-experts", "9"], "--num-experts is 9"),
    ],
)
def test_bad_options_are_refused(tmp_path, loads, capsys, arguments, message):
    assert run(tmp_path, tmp_path / "loads.npz", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plan.npz").exists()


def test_an_output_that_cannot_be_written_is_refused_before_planning(tmp_path, loads, capsys):
    arguments = ["plan", str(tmp_path / "loads.npz"), *CLUSTER, "--out"]
    assert main([*arguments, str(tmp_path / "nowhere" / "plan.npz")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kept-bytes", "inf"], "--kept-bytes is inf"),
        (["--max-moves", str(2**70)], "--max-moves is"),
        (["--previous", "before.npz", "--save-loads", "before.npz"], "which is --previous"),
        (["--save-loads", "plan.npz"], "must be two files"),
        (["--save-loads", "loads.npz"], "which is the input"),
        (["--save-loads", "/dev/null"], "must be a file in a directory that exists"),
    ],
)
def test_values_and_paths_that_cannot_be(tmp_path, loads, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "loads.npz").read_bytes()
    assert run(tmp_path, tmp_path / "loads.npz", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "plan.npz").exists() and (tmp_path / "loads.npz").read_bytes() == before


def test_a_header_that_claims_too_much_is_refused(tmp_path, capsys):
    header = {"descr": "<i8", "fortran_order": False, "shape": (100_000, 100_000, 1000)}
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive, archive.open("loads.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
    assert run(tmp_path, tmp_path / "huge.npz") == 2
    assert "huge.npz" in capsys.readouterr().err


def test_more_sequences_a_micro_batch_than_there_are(tmp_path):
    make_trace(tmp_path / "trace.npz")
    assert run(tmp_path, tmp_path / "trace.npz", "--micro-batch-sequences", str(2**70)) == 0
    assert BatchPlan.load(tmp_path / "plan.npz").num_micro_batches == 1


def test_slots_that_could_not_be_allocated_are_refused():
    with pytest.raises(InputError, match="replica_slots is 1099511627776"):
        ClusterSpec(1, 4, replica_slots=2**40)


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, tmp_path / "loads.npz", "--effort", "slow")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("relibra plan: error: argument --effort: invalid choice")


def test_estimate_says_what_the_plan_of_the_same_arguments_takes(tmp_path, loads, capsys):
    source = tmp_path / "loads.npz"
    how = ("--balance", "1", "--shape", PlanOptions().shape.name)
    assert run(tmp_path, source, *how) == 0
    plan = BatchPlan.load(tmp_path / "plan.npz", loads=loads)
    capsys.readouterr()
    assert main(["estimate", str(source), *CLUSTER, *how, "--json"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    options = PlanOptions(balance=1, shape=find_model(report["shape"]))  # that of a model of as many experts
    waited = report["planning_seconds"]
    expected = estimate_plan(plan, loads, options.setting(8, 2), planning_seconds=waited)
    assert waited > 0 and any(f"{expected.planned_seconds + waited:.4f}" in row for row in table)
    assert expected.fetched_fast_bytes + expected.kept_fast_bytes + expected.kept_slow_bytes > 0
    assert report.items() >= asdict(expected).items() and report["memory_bytes"] == expected.memory_bytes
    assert any(row.split()[:1] == ["planned"] for row in table)
    assert table[-1] == f"does not pay: {expected.does_not_pay}"  # tiny loads


def test_adapters_are_priced(tmp_path, loads, capsys):
    how = (str(tmp_path / "loads.npz"), *CLUSTER, "--json")
    gradients = []
    for rank in ("0", "16"):
        assert main(["estimate", *how, "--adapter-rank", rank]) == 0
        gradients.append(json.loads(capsys.readouterr().out.splitlines()[-1])["gradient_bytes"])
    assert 0 < 40 * gradients[1] < gradients[0]
    assert main(["estimate", *how, "--adapter-rank", "-1"]) == 2
    assert "--adapter-rank is -1" in capsys.readouterr().err


def test_estimate_refuses_what_plan_refuses(tmp_path, loads, capsys):
    assert main(["estimate", str(tmp_path / "loads.npz"), *CLUSTER, "--balance", "0.5"]) == 2
    assert "--balance is 0.5" in capsys.readouterr().err
