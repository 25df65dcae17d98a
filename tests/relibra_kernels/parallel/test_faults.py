"""A rank that is killed: the others stop with an error that says where, within the process-group timeout."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "support" / "faulty_rank.py"


@pytest.mark.parametrize(
    "phase",
    ["layer 0, moving", "dispatch of layer 1", "backward combine of layer 0", "the reduction of dense gradients"],
)
def test_the_others_stop_with_an_error(tmp_path, phase):
    size, victim = 2, 1
    start = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(size), str(tmp_path / "store"), str(victim), phase],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[victim].returncode == -9
    for rank in {*range(size)} - {victim}:
        assert ranks[rank].returncode == 3, outputs[rank]
        assert f"stopped: rank {rank} of {size} failed in {phase}" in outputs[rank][0]
        assert "died or did not answer" in outputs[rank][0]
    assert time.monotonic() - start < 80
