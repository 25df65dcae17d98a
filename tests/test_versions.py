"""`tests/versions.sh` writes what a check came to into its own row of docs/versions.md; its Python is made up here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (image|pins|newest) \| (\w+) \| ([\w ]+) \| (.+) \| (\S+) \|$", re.MULTILINE)


@pytest.fixture
def matrix(tmp_path):
    """Runs the script in a copy whose Python says `said` and ends with `status`; its result and the page's rows."""
    for name in ("tests/versions.sh", "docs/versions.md"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/versions/image/bin/python"
    python.parent.mkdir(parents=True)
    (tmp_path / ".venv/versions/image/made").touch()
    (tmp_path / ".venv/versions/numpy-2.3.5").mkdir()

    def run(said, status, *words):
        python.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {status}\n")
        python.chmod(0o755)
        done = subprocess.run(["bash", "tests/versions.sh", *words], cwd=tmp_path, capture_output=True, text=True)
        return done, rows(tmp_path / "docs/versions.md")

    return run


def rows(page):
    return {(environment, check): rest for environment, check, *rest in ROW.findall(page.read_text())}


def test_one_check_writes_its_row_only(matrix):
    before = rows(ROOT / "docs/versions.md")
    done, after = matrix("a | b\\n62 passed, 1 skipped, 3 warnings in 40.12s\\n\\n", 0, "image", "planner")
    assert done.returncode == 0, done.stderr
    assert after[("image", "planner")][:2] == ["passed", "62 passed, 1 skipped"]
    assert {k: v for k, v in after.items() if k != ("image", "planner")} == {
        k: v for k, v in before.items() if k != ("image", "planner")
    }


def test_a_failure_is_written_and_the_next_check_runs(matrix):
    done, after = matrix("1 failed, 2 passed in 1.00s\\n", 1, "image", "huggingface", "sm_90")
    assert done.returncode == 1
    assert done.stderr.count("1 failed, 2 passed in 1.00s") == 2, "the log of what failed"
    assert after[("image", "huggingface")][:2] == after[("image", "sm_90")][:2] == ["FAILED", "1 failed, 2 passed"]


def test_what_is_no_environment_or_check_is_refused(matrix):
    done, after = matrix("", 0, "sm_70")
    assert done.returncode == 2 and "sm_70 is neither" in done.stderr
    assert after == rows(ROOT / "docs/versions.md")


def test_every_check_of_every_environment_has_a_row():
    listed = re.search(r"^    checks=\((.*)\)$", (ROOT / "tests/versions.sh").read_text(), re.MULTILINE).group(1)
    every = [(e, c) for e in ("image", "pins", "newest") for c in listed.split()]
    every.remove(("image", "sm_103"))  # whose Triton cannot read its code
    assert [*rows(ROOT / "docs/versions.md")] == every
