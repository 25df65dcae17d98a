"""Ctrl-C, which a terminal sends to every process of a command: one clean line, status 130, nothing left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

SLOW_POLICY = """
import pathlib, time
from relibra_kernels.planner import outcome_of_plan, static_plan

def sleeps(loads, cluster):
    if loads.shape[1] > 1:  # the batch, not the look whether it can be served
        pathlib.Path("begun").touch()
        time.sleep(60)
    return outcome_of_plan(static_plan(loads, cluster), loads)
"""


def members(group):
    """Command lines of the processes of a group."""
    found = []
    for line in subprocess.run(
        ["ps", "-e", "-ww", "-o", "pgid=,stat=,args="], capture_output=True, text=True
    ).stdout.split("\n"):
        pgid, state, args = (*line.split(None, 2), "", "", "")[:3]
        if pgid == str(group) and not state.startswith("Z"):
            found.append(args)
    return found


def _hear_ctrl_c():
    """In the new process: where this one runs in the background of a script, it would ignore the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(arguments, has_begun, folder, seconds=240):
    """(status, stdout, stderr) of a command that gets Ctrl-C once it is at work."""
    command = [sys.executable, "-m", "relibra_kernels", *arguments]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=folder, start_new_session=True, preexec_fn=_hear_ctrl_c
        )
        try:
            end = time.monotonic() + seconds
            while not has_begun(process):
                assert process.poll() is None and time.monotonic() < end, (folder / "err").read_text()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            status = process.wait(90)  # a busy machine takes its time
            end = time.monotonic() + 10
            while (left := members(process.pid)) and time.monotonic() < end:
                time.sleep(0.1)
            assert not left, left
        finally:
            if members(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, (folder / "out").read_text(), (folder / "err").read_text()


def test_simulate(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_POLICY)
    sizes = ["--ep", "8", "--layers", "1", "--micro-batches", "2", "--models", "OLMoE"]
    arguments = ["simulate", *sizes, "--policies", "static", "--policy", "slow.py:sleeps", "--html", "report.html"]
    status, _, errors = interrupt(arguments, lambda _: (tmp_path / "begun").exists(), tmp_path)
    assert status == 130 and errors.split("\n") == ["", "relibra simulate: stopped", ""], errors
    assert not (tmp_path / "report.html").exists()


def test_tune(tmp_path):
    pytest.importorskip("triton", reason="tuning compiles with Triton")
    arguments = ["tune", "--device", "H100", "--model", "Qwen3-30B-A3B", "--out", "configs"]
    workers = lambda process: sum("compile_worker" in args for args in members(process.pid))  # noqa: E731
    status, _, errors = interrupt(arguments, workers, tmp_path)
    assert status == 130 and errors.count("\n") == 1, errors
    assert errors.startswith("stopped with ") and errors.endswith("candidates left; go on with --resume\n")


def test_demo(tmp_path):
    """While its ranks train."""
    pytest.importorskip("transformers", reason="the demo's model is a transformers one")
    pytest.importorskip("matplotlib", reason="the demo draws a plot")
    arguments = ["demo", "--training-steps", "2", "--prompts", "1", "--repeats", "2", "--out", "output"]
    ranks = lambda process: sum("spawn_main" in args for args in members(process.pid)) == 2  # noqa: E731
    status, _, errors = interrupt(arguments, ranks, tmp_path)
    assert status == 130 and "Traceback" not in errors and errors.endswith("\nrelibra demo: stopped\n"), errors
