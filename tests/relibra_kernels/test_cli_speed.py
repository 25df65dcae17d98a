"""What a user waits for: `relibra --help`, and `relibra plan` of a recorded trace of gpt-oss-20b's size.

Counted in seconds of CPU time of the command's process, so that what else the machine does is not counted; the best of
three, since caches may be cold. Limits are those of one core of a server of 2020 or newer.
"""

import os
import subprocess
import sys

from relibra_kernels.planner import generate_trace


def cpu_seconds(arguments):
    """(CPU seconds of the command, what it printed)."""
    command = [sys.executable, "-m", "relibra_kernels", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        printed = run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    assert run.returncode == 0, printed
    return usage.ru_utime + usage.ru_stime, printed


def test_help_is_there_at_once():
    seconds, printed = min(cpu_seconds(["--help"]) for _ in range(3))
    assert "relibra" in printed and seconds <= 0.3


def test_a_recorded_batch_is_planned_while_one_waits(tmp_path):
    """24 layers, 352 sequences of 299 tokens, top 4 of 32, in 44 micro-batches; the gain is the last line."""
    trace = tmp_path / "trace.npz"
    generate_trace(24, 352, 32, 4, 299, max_mean=4).save(trace)
    arguments = ["plan", str(trace), "--nodes", "1", "--gpus-per-node", "8", "--micro-batch-sequences", "8"]
    seconds, printed = min(cpu_seconds(arguments) for _ in range(3))
    assert seconds <= 3.0
    last = printed.splitlines()[-1]
    assert last.startswith("static -> plan: max/mean ") and ("as fast" in last or "no gain" in last)
    assert cpu_seconds([*arguments, "--json"])[1].splitlines()[-2].startswith("static -> plan: ")
