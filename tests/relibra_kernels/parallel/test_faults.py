"""A rank that dies or hangs: the others stop with an error that says where, within the process-group timeout (10 s)."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "support" / "faulty_rank.py"


@pytest.mark.parametrize(
    ("phase", "signal", "size"),
    [
        ("layer 0, moving", "SIGKILL", 2),
        ("dispatch of layer 1", "SIGKILL", 3),
        ("backward combine of layer 0", "SIGKILL", 2),
        ("the reduction of dense gradients", "SIGKILL", 2),
        ("combine of layer 0", "SIGSTOP", 2),
    ],
)
def test_the_others_stop_with_an_error(tmp_path, phase, signal, size):
    victim = size - 1
    start = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(size), str(tmp_path / "store"), str(victim), phase, signal],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks[:victim]]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank in range(victim):
        assert ranks[rank].returncode == 3, outputs[rank]
        # with three ranks, a survivor may first notice in the exchange after
        assert f"stopped: rank {rank} of {size} failed in" in outputs[rank][0]
        assert size > 2 or f"failed in {phase}" in outputs[rank][0]
        assert "rank died, or did not answer" in outputs[rank][0]
    assert time.monotonic() - start < 80
