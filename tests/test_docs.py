"""Every code block in README and docs is executed; links lead somewhere; the API page is up to date.

Python blocks of a page run in order in one namespace; a block marked `torchrun` is a program for two ranks; of `bash`
blocks, `relibra` commands run after the page's Python (test_commands.py has all other commands); a block marked with a
file's name is that file. `text` blocks are output and synopses.
"""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from relibra_kernels.cli import main
from relibra_kernels.planner import generate_trace

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"python (\w+\.py)")  # what a block is marked with that is a file for the page's commands
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, kind):
    return [code for info, code in FENCE.findall(page.read_text()) if info.strip() == kind]


def pages_with(kind):
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, kind)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pages' files are: a trace of 64 experts, and what `make demo` leaves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").mkdir()
    trace = generate_trace(2, 32, 64, 4, 24)
    trace.save("trace.npz")
    trace.save("demo-output/trace.npz")
    return tmp_path


def test_every_block_says_what_it_is():
    for page in PAGES:
        kinds = {info.strip() for info, _ in FENCE.findall(page.read_text())}
        kinds = {kind for kind in kinds if not FILE.fullmatch(kind)}
        assert kinds <= {"python", "python torchrun", "bash", "text"}, page


@pytest.mark.parametrize("page", [case for case in pages_with("python") if case.id != "README"])  # see test_readme.py
def test_python_blocks_run_in_order(page, folder):
    if "transformers" in page.read_text():
        pytest.importorskip("transformers", reason="the page is about transformers models")
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("python torchrun"))
def test_programs_for_two_ranks_run(page, folder):
    programs = "".join(blocks(page, "python torchrun"))
    for package, word in (("transformers", "transformers"), ("accelerate", "from_pretrained")):
        if word in programs and importlib.util.find_spec(package) is None:
            pytest.skip(f"the page's programs need {package}")
    for number, block in enumerate(blocks(page, "python torchrun")):
        Path(f"program{number}.py").write_text(block)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*command, f"program{number}.py"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("dispatch") >= 2, done.stdout


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_run_in_their_pages_order(page, folder):
    for info, code in FENCE.findall(page.read_text()):
        if named := FILE.fullmatch(info.strip()):
            Path(named[1]).write_text(code)
    if page.stem in ("quickstart", "CONTRIBUTING"):  # their commands follow their Python blocks
        pytest.importorskip("transformers", reason="the page is about transformers models")
        namespace: dict[str, object] = {"__name__": page.stem}
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), namespace)
    for line in "".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "relibra":
            assert main(words[1:]) == 0, line


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_leads_to_every_other():
    for page in PAGES:
        found = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        reached = {(page.parent / target).resolve() for target in found if "://" not in target}
        missing = {other.name for other in PAGES if other.resolve() not in reached and other != page}
        assert not missing, f"{page.name} leads not to {missing}"


def test_files_that_are_named_exist():
    named = re.compile(r"`((?:relibra_kernels|planner|tests|bench|docs|examples|autotune_configs)/[\w./]+)`")
    for page in PAGES:
        for path in named.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_api_page_is_that_of_the_docstrings():
    pytest.importorskip("transformers", reason="its integration is part of the API")
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    written = (ROOT / "docs" / "api.md").read_text()
    assert written == make_api.render(), "run python docs/make_api.py"
