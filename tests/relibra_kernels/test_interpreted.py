"""Run the kernel tests in Triton's interpreter: it must be chosen before triton is imported, so in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.configs.interpreter import interpreter_fault

pytestmark = pytest.mark.skipif(bool(interpreter_fault()), reason=interpreter_fault())
HERE = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("test_*.py")))
def test_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RELIBRA_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_kernels_are_not_tested_on_plain_torch(backend):
    environment = {name: value for name, value in os.environ.items() if name != "RELIBRA_BACKEND"}
    environment |= {"TRITON_INTERPRET": "1"} | ({"RELIBRA_BACKEND": backend} if backend else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_tiles.py")]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"RELIBRA_BACKEND {backend!r}; it must be 'triton'" in done.stderr
