"""The instrument of `bench/gpu.py` without a GPU: what crashes, hangs or does not compile loses only itself."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import pytest
import torch
from entry_kernels import entry_kernels
from gpu_stages import correct, kernels, layer, rank_checks, smoke, step, tune
from gpu_stages.ahead import launches_ahead
from gpu_stages.case import OK, STAGES, STATUSES, Case, Result, empty, plain, results_of
from gpu_stages.clock import FakeClock, times_of
from gpu_stages.problems import FORMS
from gpu_stages.profile import timeline
from gpu_stages.runner import Runner
from gpu_stages.table import tables
from gpu_stages.worker import Missing, Wrong, status_of

from relibra_kernels.cli import main
from relibra_kernels.configs.files import load_entries, path_of
from relibra_kernels.configs.limits import device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.form import Activation
from relibra_kernels.kernels.launch import Launch, recording
from relibra_kernels.planner.errors import FormatError
from relibra_kernels.tuning.catalogue import PARTS
from relibra_kernels.tuning.import_results import measured_entries

BENCH = Path(__file__).parents[1] / "bench"
MODULES = {"smoke": smoke, "correct": correct, "kernels": kernels, "layer": layer, "tune": tune, "step": step}


@pytest.fixture(scope="module")
def deliberate(tmp_path_factory):
    """(exit status, results) of the deliberate failures, and the kernel after them."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, str(BENCH / "gpu.py"), "smoke", "--rehearse", "--only", "deliberate"]
    done = subprocess.run(command, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True, timeout=400)
    return done, out


def test_failures_are_contained_and_told_apart(deliberate):
    done, out = deliberate
    assert done.returncode == 0, done.stdout + done.stderr
    found = {result.case.removeprefix("deliberate "): result for result in results_of(out / "results.jsonl")}
    assert {name: result.status for name, result in found.items()} == {
        "crash": "crashed",
        "hang": "timeout",
        "compiler error": "not_compiled",
        "compiler crash": "not_compiled",
        "error": "wrong",
        "lack": "missing",
    }
    assert found["crash"].figures == found["hang"].figures == {"begun": 1}  # what was found before is kept
    assert "Segmentation fault" in found["crash"].error and "in hang" in found["hang"].error
    assert 2 <= found["hang"].seconds < 4


def test_a_line_has_what_is_promised(deliberate):
    _, out = deliberate
    for line in (out / "results.jsonl").read_text().splitlines():
        fields = json.loads(line)
        assert list(fields) == ["stage", "case", "status", "seconds", "device", "figures", "error"]
        assert fields["status"] in STATUSES and fields["device"] == "rehearsal"
    assert (out / "gpu-results.tar.gz").stat().st_size > 500
    assert "| smoke | " in (out / "table.md").read_text()


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, str(BENCH / "gpu.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--rehearse" in done.stderr and not list(tmp_path.iterdir())


def test_out_of_time_is_written_down(tmp_path):
    runner = Runner(tmp_path / "results.jsonl", tmp_path / "work", rehearse=True, device="rehearsal", at_once=1)
    runner.run("smoke", [Case("one", "peaks"), Case("two", "peaks")], until=0)
    runner.close()
    assert [(r.case, r.status) for r in results_of(tmp_path / "results.jsonl")] == [
        ("one", "not_reached"),
        ("two", "not_reached"),
    ]


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_case_has_its_function(rehearse):
    names = []
    for stage, module in MODULES.items():
        for case in module.cases(rehearse):
            of, _, function = case.function.rpartition(".")
            source = (BENCH / "gpu_stages" / f"{of or stage}.py").read_text()
            assert f"\ndef {function}(" in source, case
            assert json.loads(json.dumps(dict(case.options))) is not None
            names.append((stage, case.name))
        rehearsed = [case for case in module.cases(True) if case.rehearsed and case.expect == OK and not case.may_miss]
        assert len(rehearsed) >= 2 or stage in ("step", "layer"), stage
    assert len(set(names)) == len(names) > 100
    assert list(MODULES) == list(STAGES) and sum(STAGES.values()) <= 28 * 60


def test_no_kernel_is_left_out():
    """A kernel of the catalogue that no stage launches is a kernel that no GPU test has seen."""
    for module in (smoke, correct, kernels):
        assert set(module.KERNELS) == set(PARTS), module.__name__
    assert all(part in PARTS[kernel] for kernel, part in tune.PARTS)
    assert {kernel for kernel, _ in tune.PARTS} >= {"gate_up", "grouped_gemm", "grad_hidden", "grad_weight"}


class OnTheCpu:
    """A setting for what is recorded and not run."""

    device = torch.device("cpu")
    report = Mock()

    def size(self, real, tiny):
        return real

    def randn(self, *shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)


def test_every_kernel_is_launched_on_a_gpu():
    """All entry points of the package, also those that only rows on their way between ranks need."""
    device = device_for(PRODUCTS["H100"])
    launched = {launch.kernel.__name__ for launch in launches_ahead(device, rehearse=False)}
    checked: list[Launch] = []
    for check in (rank_checks.payload, rank_checks.packed_replicas):
        with recording(device, checked.append), suppress(Wrong):  # nothing runs, so nothing is right
            check(OnTheCpu())
    entries = entry_kernels()
    assert len(entries) > 10
    assert launched | {launch.kernel.__name__ for launch in checked} == entries
    assert {case.function for case in correct.cases(False)} >= {"rank_checks.payload", "rank_checks.packed_replicas"}


def test_every_activation_is_checked_on_a_gpu():
    assert {FORMS[name].activation for name in correct.FORMS} == set(get_args(Activation))


def test_what_an_exception_means():
    class PTXASError(Exception):
        pass

    assert status_of(Wrong("x")) == status_of(AssertionError()) == "wrong"
    assert status_of(Missing("x")) == status_of(ModuleNotFoundError("x", name="liger_kernel")) == "missing"
    assert status_of(ModuleNotFoundError("x", name="relibra_kernels.nn")) == "crashed"
    assert status_of(PTXASError()) == status_of(RuntimeError("PassManager::run failed")) == "not_compiled"
    assert status_of(RuntimeError("CUDA error: an illegal memory access was encountered")) == "crashed"


def test_figures_that_say_nothing_are_found():
    assert plain({"a": float("nan"), "b": [1.23456789, True]}) == {"a": None, "b": [1.23457, True]}
    assert empty({"a": 1, "b": [{"c": None}, {"d": ""}], "e": [], "f": {}}) == ["b.c", "b.d"]
    assert empty({}) == ["(all)"]


def test_a_cut_line_is_left_out_and_the_last_result_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    first = Result("smoke", "versions", "crashed", 1.0, "H100", {}, "x")
    path.write_text("\n".join([first.line(), replace(first, status="ok").line(), first.line()[:40]]))
    assert [result.status for result in results_of(path)] == ["ok"]


def test_times():
    assert times_of([3.0, 1.0, 2.0, 4.0, 5.0], "events").median == 3.0
    taken = times_of([float(i) for i in range(11)], "events")
    assert (taken.low, taken.high, taken.spread) == (2.0, 8.0, 1.2)
    ran = []
    clock = FakeClock()
    assert clock.of([lambda: ran.append(1)]).how == "fake" and ran == [1]


def test_a_timeline_counts_launches_and_gaps():
    events = [
        {"cat": "kernel", "name": "b", "ts": 20.0, "dur": 5.0},
        {"cat": "kernel", "name": "a", "ts": 0.0, "dur": 10.0},
        {"cat": "gpu_memcpy", "name": "c", "ts": 8.0, "dur": 4.0},  # beside a
        {"cat": "cpu_op", "name": "host", "ts": 0.0, "dur": 100.0},
    ]
    found = timeline(events, ("kernel", "gpu_memcpy"))
    assert (found["launches"], found["copies"]) == (2, 1)
    assert (found["span_ms"], found["busy_ms"], found["idle_ms"]) == (0.025, 0.017, 0.008)
    assert found["longest_gaps"] == [{"ms": 0.008, "before": "b"}]


def test_rank_correlation():
    assert tune.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert tune.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert tune.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def tuned(device="NVIDIA H100 80GB HBM3", **changed):
    bucket = {"slots": 32, "rows_per_slot": 256, "config": "128x128x64w8s3", "us": 41.5, "spread": 0.01}
    figures = {
        "product": "H100", "model": "Qwen3-30B-A3B", "kernel": "grad_weight", "part": "down", "triton": "3.6.0",
        "driver": "580.1", "date": "2026-11-26", "buckets": [{**bucket, "regret": 0.1, "timed": {}}],
    }  # fmt: skip
    return Result("tune", "grad_weight down", "timeout", 9.0, device, {**figures, **changed}, "").line()


def test_measured_configs_are_imported(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join([Result("smoke", "peaks", "ok", 1, "x", {}, "").line(), tuned(), "{cut"]))
    assert main(["tune", "--import", str(results), "--out", str(tmp_path / "configs")]) == 0
    assert "1 entries, 1 buckets" in capsys.readouterr().out
    (entry,) = load_entries(path_of(tmp_path / "configs", "H100", "grad_weight"), "H100", "grad_weight")
    assert (entry.evidence, entry.triton, entry.H, entry.I) == ("measured", "3.6.0", 2048, 768)
    (bucket,) = entry.buckets
    assert (bucket.slots, bucket.rows_per_slot, bucket.config, bucket.us) == (32, 256, "128x128x64w8s3", 41.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no measured configs"),
        (tuned(device="rehearsal"), "holds no measured configs"),
        (tuned(product="Voodoo2"), "line 1: .*Voodoo2"),
        (tuned(model="GPT-2"), "line 1: .*GPT-2"),
        (tuned(buckets=[{"config": "999x1x1w1s1"}]), "line 1: config '999x1x1w1s1' of grad_weight"),
    ],
)
def test_what_cannot_be_imported_is_refused(tmp_path, lines, message):
    results = tmp_path / "results.jsonl"
    results.write_text(lines)
    with pytest.raises(FormatError, match=message):
        measured_entries(results)


def test_tables_show_every_stage_and_what_is_wrong():
    times = {"part": "down", "tokens": 256, "replicas": 0, "us": 10.0, "low": 9.0, "high": 11.0, "how": "graph"}
    results = [
        Result("smoke", "peaks", "ok", 1, "H100", {"matmul_tflops": 750.0, "copy_tbs": 2.9}, ""),
        Result("correct", "layer qwen bf16", "wrong", 1, "H100", {"worst_error": 0.5}, "Wrong: far | off\nmore"),
        Result("kernels", "grouped_gemm x", "ok", 1, "H100", {"times": [times]}, ""),
        Result("tune", "t", "ok", 1, "H100", json.loads(tuned())["figures"], ""),
    ]
    results[3].figures["buckets"][0] |= {"used_now": "64x64x64w4s3", "rank_correlation": 0.5}
    text = tables(results)
    assert "Device: H100. 750 TFLOP/s matmul, 2.9 TB/s copy" in text
    assert "| correct | layer qwen bf16 | wrong | Wrong: far / off |" in text
    assert "| grouped_gemm x | down | 256 | 0 | 10 | 9 | 11 | graph |" in text
    assert "| t | 32 x 256 | 128x128x64w8s3 | 41.5 | 64x64x64w4s3 | 10.0% | 0.5 | 0 |" in text


def report_into(page, results, device):
    lines = [{"stage": "correct", "case": "layer qwen bf16", "status": "ok", "seconds": 1, "device": device}]
    results.write_text(
        "".join(json.dumps({**line, "figures": {"worst_error": 0.004}, "error": ""}) + "\n" for line in lines)
    )
    command = [sys.executable, str(BENCH / "gpu_report.py"), str(results), "--write", str(page)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_gpus_results_go_between_the_marks_of_the_page(tmp_path):
    before = (BENCH.parent / "docs" / "benchmarks.md").read_text()
    page = tmp_path / "page.md"
    page.write_text(before)
    refused = report_into(page, tmp_path / "results.jsonl", "rehearsal")
    assert refused.returncode == 1 and "no results of a GPU" in refused.stderr and page.read_text() == before
    assert report_into(page, tmp_path / "results.jsonl", "NVIDIA H100 80GB HBM3").returncode == 0
    head, tail = (before.split(mark)[part] for mark, part in (("<!-- measured", 0), ("<!-- end -->", 1)))
    after = page.read_text()
    assert after.startswith(head) and after.endswith(tail) and after.count("<!-- end -->") == 1
    assert "Device: NVIDIA H100 80GB HBM3" in after and "| layer qwen bf16 | ok | 0.004 |" in after
    page.write_text(head)
    unmarked = report_into(page, tmp_path / "results.jsonl", "NVIDIA H100 80GB HBM3")
    assert unmarked.returncode == 1 and "no place between the marks" in unmarked.stderr
