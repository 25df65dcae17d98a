"""Every command that README, CONTRIBUTING and docs show, and how each is shown to work.

A command is a line of a `bash` block, a line of a `text` block or code in a sentence that begins with a program's name.
`RUN` are run by tests/test_commands.py, `LONG` too where RELIBRA_COMMANDS=all, as `make nightly` sets it. `STEPS` are
steps of a gate themselves, or part of one. `ELSEWHERE` cannot run here, for the reason that is said.
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "api.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:\.venv/bin/)?(?:relibra|python|pytest|ruff|make|bash|pip|torchrun) \S")

GPU = "needs a GPU"
CLUSTER = "needs a cluster"

LONG = {  # seconds to minutes of two cores each
    "relibra simulate --html report.html",
    "relibra simulate --workload zipf --tokens 2048 --ep 64 --kept-bytes 2e9 --transport two",
    "relibra bench --model FOLDER/config.json",
    "pytest bench/",
    "python bench/cpu_layer.py",
    "python bench/counted.py",
    "python bench/host_path.py",
    "python bench/ep.py --ranks 2 --json",
    "python bench/planned.py",
    "torchrun --standalone --nproc-per-node 4 examples/train_ep.py --copies 2",
    "relibra compile --target sm_90 --dump DIR",
}
STEPS = {  # command -> what of .ci/run, `make nightly` or a test runs it
    "make demo": "nightly",
    "make quick": "nightly",  # as quick-in-time
    "make test": "ci",
    "make lint": "ci",
    "make docs": "ci",
    "make rehearse": "ci",
    "make release-check": "ci",
    "make test-megatron": "ci",
    "make test-megatron MEGATRON=0.19.2": "nightly",
    "make compile-gate": "ci",
    "make check-configs": "nightly",
    "make compile-matrix": "nightly",
    "make test-families": "nightly",
    "make test-extras": "nightly",
    "make test-versions": "nightly",
    'make test-versions VERSIONS="image sm_90"': "nightly",
    "bash .ci/run": "nightly",
    "pip install -e .[transformers]": "ci",
    "pip install megatron-core==0.16.1": "ci",
    "pip install accelerate": "ci",
    "python docs/make_api.py": "tests/test_docs.py",
    ".venv/bin/python docs/make_api.py": "tests/test_docs.py",
    "python tests/support/house.py": "tests/test_imports.py",
    ".venv/bin/ruff format .": "ci",
    "relibra compile --device H100": "ci",
    "relibra compile --target sm_90 --candidates": "nightly",
    "python bench/planned.py --rivals": "nightly",
    "torchrun --standalone --nproc-per-node 2 examples/train_ep.py": "tests/test_examples.py",
    "torchrun --nproc-per-node 2 examples/train_megatron.py": "ci",
}
ELSEWHERE = {  # the beginning of a command -> why it is not run
    "make nightly": "it is what runs the rest",
    "make tune-offline": "an hour of compiling; `make check-configs` holds what it wrote",
    "relibra tune --model all --device H100": "an hour of compiling; `make check-configs` holds what it wrote",
    "relibra tune --model": GPU,
    "relibra tune --import": GPU + "; the rehearsal imports what it made up",
    "relibra tune --check": "`make check-configs` is this",
    "bash bench/gpu.sh": GPU + "; `make rehearse` runs its stages without one",
    "python bench/gpu_report.py": GPU + "; the rehearsal writes its report",
    "torchrun --standalone --nproc-per-node 8 examples/train_ep.py --device cuda": GPU,
    "torchrun --nnodes": CLUSTER,
    "pip install relibra-kernels[transformers] @ git+URL": "the address is the reader's",
    "pip install relibra-kernels": "not released yet",
    "pip install pre-commit": "another project's program",
    "torchrun --nproc-per-node 2": "what a block marked `torchrun` is run with",
    ".venv/bin/python -m pytest": "the tests themselves",
    "python my_file.py": "how a block is marked",
    "relibra demo --time-limit": "tests/relibra_kernels/test_cli_demo.py runs it",
}


def commands() -> dict[str, set[str]]:
    """Command as a shell takes it, without comments and what is optional -> the pages that show it."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text()
        lines = []
        for info, code in FENCE.findall(text):
            if info.strip() in ("bash", "text"):
                lines += re.sub(r" *\\\n *", " ", code).splitlines()
        lines += re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
        for line in lines:
            line = " ".join(line.split())
            if PROGRAM.match(line):
                found.setdefault(_plain(line), set()).add(page.name)
    return {line: pages for line, pages in found.items() if not _only_named(line)}


def _plain(line: str) -> str:
    """Without comments, `[--optional]` parts and an ellipsis."""
    line = re.sub(r" \[-[^\]]*\]", "", line).removesuffix("...").strip()
    return shlex.join(shlex.split(line, comments=True)).replace("'", "") if "VERSIONS" not in line else line


def _only_named(line: str) -> bool:
    """`relibra plan` in a sentence names a command; it runs nothing."""
    words = line.split()
    return words[0] == "relibra" and len(words) == 2 and words[1] != "doctor"


def elsewhere(line: str) -> str | None:
    return next((why for begin, why in ELSEWHERE.items() if line.startswith(begin)), None)


def to_run(all_of_them: bool) -> list[str]:
    """Those that test_commands.py runs."""
    left = [line for line in commands() if line not in STEPS and elsewhere(line) is None]
    return sorted(line for line in left if all_of_them or line not in LONG)
