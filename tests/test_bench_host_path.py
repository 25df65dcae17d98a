"""`bench/host_path.py`: its figures are there and of the right order, and a wrong layer is not timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "host_path.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_the_last_line_says_the_milliseconds():
    done = run()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"critical_ms", "ahead_ms", "launchers_ms", "moving_ms"}
    assert (
        0 < found["moving_ms"] < found["critical_ms"] < 5 and 0 < found["ahead_ms"] < 5
    )  # tables made in numpy took 7.9 and 9.3


def test_a_wrong_layer_is_not_timed(tmp_path):
    """A copy of the code in which combining adds nothing up."""
    for name in ("relibra_kernels", "planner", "autotune_configs"):
        target = tmp_path / name
        subprocess.run(["cp", "-r", str(ROOT / name), str(target)], check=True)
    hop = tmp_path / "relibra_kernels" / "parallel" / "tokens" / "hop.py"
    text = hop.read_text()
    right = "return ops.unpermute(rows.sent, None, self._send, out=out_TH)"
    assert right in text
    hop.write_text(text.replace(right, f"{right} * 2"))
    done = run("--tree", str(tmp_path))
    assert done.returncode == 1
    assert "output or gradients are wrong" in done.stderr and not done.stdout.strip()


def test_a_folder_without_the_project_is_refused(tmp_path):
    done = run("--tree", str(tmp_path))
    assert done.returncode == 2
    assert "it must be a checkout with a folder relibra_kernels" in done.stderr
