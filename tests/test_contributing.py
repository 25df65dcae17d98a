"""What CONTRIBUTING.md names is there: every path, and every name that it says is in a file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"`([^`\n]+)`")
# `name` in `path`, `name` of `function` in `path`, `name` of `path`
NAMED = re.compile(r"`([\w.]+)`(?:\s+of\s+`([\w.]+)`)?,?\s+(?:in|of)\s+`([\w./]+\.py)`")


def missing_paths(text):
    """Those of the text that lie in no folder from which pages name files."""
    named = {code.split(",")[0] for code in CODE.findall(text) if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", code)}
    folders = (ROOT, ROOT / "relibra_kernels")
    return sorted(name for name in named if not any((folder / name).exists() for folder in folders))


def missing_names(text):
    """(name, path) where the file does not have one of the parts of the name."""
    missing = []
    for name, owner, path in NAMED.findall(text):
        source = (ROOT / path).read_text()
        for part in [name, *filter(None, [owner])]:
            made = (rf"^\s*((async )?def |class |){word}\b( =|: |\(|,)" for word in part.split("."))
            if f"{part}(" not in source and not all(re.search(how, source, re.MULTILINE) for how in made):
                missing.append((part, path))
    return missing


def test_all_of_it_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(NAMED.findall(text)) >= 10
    assert missing_paths(text) == [] and missing_names(text) == []


@pytest.mark.parametrize(
    ("was", "changed"),
    [
        ("`planner/solver/hosts.py`", "`planner/solver/hosting.py`"),
        ("`planner/formats/`", "`planner/loaders/`"),
        ("`reference/__init__.py`", "`reference/all.py`"),
    ],
)
def test_a_path_that_is_not_there_is_found(was, changed):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert was in text
    assert missing_paths(text.replace(was, changed)) == [changed.strip("`")]


@pytest.mark.parametrize(
    ("was", "changed"),
    [
        ("`best_host`", "`worst_host`"),
        ("`ExpertParallelMLP.backward`", "`ExpertParallelMLP.backwards`"),
        ("`kept_seconds`", "`seconds_kept`"),
    ],
)
def test_a_name_that_is_not_there_is_found(was, changed):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert was in text
    assert [name for name, _ in missing_names(text.replace(was, changed))] == [changed.split("`")[1]]


def test_too_much_cpu_time_fails(capfd):
    """What holds the collection of tests and `make quick` to their times; a wait costs nothing."""
    program = [sys.executable, str(ROOT / ".ci" / "cpu_seconds.py")]
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    assert subprocess.run([*program, "60", sys.executable, "-c", busy]).returncode == 0
    assert subprocess.run([*program, "0.5", sys.executable, "-c", busy]).returncode == 1
    assert subprocess.run([*program, "60", sys.executable, "-c", "exit(3)"]).returncode == 3
    assert "s of CPU time, 0.5 at most" in capfd.readouterr().out
