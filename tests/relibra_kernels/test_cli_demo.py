"""The demo, small: everything that it promises to save, and exact results."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from relibra_kernels.cli import main
from relibra_kernels.planner import BatchPlan, RoutingTrace, count_loads

pytest.importorskip("transformers", reason="the demo's model is a transformers one")
pytest.importorskip("matplotlib", reason="the demo draws a plot")

SMALL = ["--training-steps", "2", "--prompts", "1", "--repeats", "2"]


COMMAND = [sys.executable, "-m", "relibra_kernels", "demo", *SMALL]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "output"
    done = subprocess.run([*COMMAND, "--out", str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done, out, json.loads((out / "summary.json").read_text())


def test_the_ranks_compute_what_one_process_computes(demo):
    _, _, summary = demo
    for name in ("parity_loss", "parity_grad", "parity_parameters"):
        assert 0 <= summary[name] <= 1e-5, name


def test_the_plan_balances_the_recorded_routing(demo):
    _, out, summary = demo
    trace = RoutingTrace.load(out / "trace.npz")
    assert trace.only_last_tokens_unknown and trace.unknown.sum() == trace.num_sequences
    groups = [4 * i // trace.num_sequences for i in range(trace.num_sequences)]
    plan = BatchPlan.load(out / "plan.npz", loads=count_loads(trace, groups))
    assert plan.num_ranks == 2
    assert summary["planned_max_mean"] < summary["static_max_mean"]
    assert summary["planned_max_mean"] <= 1.05


def test_the_table_and_the_summary_agree(demo):
    done, out, summary = demo
    for policy in ("static", "planned", "balanced"):
        assert f"{summary[f'{policy}_s']:.3f} s" in done.stdout
        assert f"{summary[f'{policy}_max_mean']:.3f}" in done.stdout
    assert summary["seconds"] > summary["static_s"] > 0
    assert (out / "loads.png").read_bytes().startswith(b"\x89PNG")


def test_the_trace_can_be_planned_from_the_shell(demo, tmp_path):
    _, out, _ = demo
    cluster = ["--nodes", "1", "--gpus-per-node", "2", "--replica-slots", "2"]
    plan = tmp_path / "plan.npz"
    assert main(["plan", str(out / "trace.npz"), "--micro-batch-sequences", "8", *cluster, "--out", str(plan)]) == 0
    assert BatchPlan.load(plan).num_micro_batches == 4


def test_no_round_begins_after_the_time_limit(tmp_path, capsys):
    arguments = ["demo", *SMALL, "--repeats", "50", "--time-limit", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    printed = " ".join(capsys.readouterr().out.split())
    assert summary["rounds"] == 1 and "1 interleaved rounds of 50, which the time limit ended" in printed
    assert "WARNING: this run was too noisy to say which is faster: too few timed rounds" in printed


def test_ranks_that_hang_end_the_demo(tmp_path, capsys, monkeypatch):
    from relibra_kernels.cli.demo import ranks

    monkeypatch.setattr(ranks, "STALLED", 1.0)  # they take longer than that to start
    assert main(["demo", *SMALL, "--time-limit", "1", "--out", str(tmp_path / "out")]) == 2
    assert "the 2 ranks finished no step in 1 s" in capsys.readouterr().err
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "spawn_main"], capture_output=True, text=True)
    assert not children.stdout


def test_a_rank_that_dies_ends_with_status_2(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as demo:
        errors = b""
        while not re.search(rb"training on 2 ranks[^\r]* 1/", errors):  # both ranks are at work
            errors += os.read(demo.stderr.fileno(), 4096)
            assert demo.poll() is None, errors
        children = subprocess.run(["pgrep", "-P", str(demo.pid), "-f", "spawn_main"], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        errors = demo.communicate(timeout=120)[1].decode()
    assert demo.returncode == 2, errors
    assert "relibra demo: error: rank" in errors and "Traceback" not in errors


def test_bad_arguments_end_with_status_2(tmp_path, capsys):
    for arguments in (["--repeats", "0"], ["--prompts", "many"], ["--seed", "-1"], ["--time-limit", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(["demo", *arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["demo", *SMALL, "--out", str(tmp_path / "file")]) == 2
    assert f"--out is {tmp_path / 'file'}: it must be a folder" in capsys.readouterr().err
