"""Figures on the pages agree with the tables, the code and the other pages that they come from."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from relibra_kernels.planner import DEVICES, MODELS, find_device, find_model
from relibra_kernels.planner.pricing.models import SEQUENCE_LENGTH

ROOT = Path(__file__).parents[1]
PAGES = {p.name: p.read_text() for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))}


def test_the_demos_sentence_is_that_of_its_table():
    """README's example of what `make demo` prints."""
    text = PAGES["README.md"]

    def row(label, unit=""):
        found = re.search(rf"^ *{label} +([\d. s-]+)$", text, re.MULTILINE)
        return [float(value) for value in found[1].replace(unit or "\0", "").split()]

    static, planned, balanced = row(r"step time, median \(measured\)", " s")
    ratios = row("ratio to balanced")
    np.testing.assert_allclose(ratios, np.array([static, planned, balanced]) / balanced, atol=6e-4)
    speedup, share = re.search(r"planned step is ([\d.]+)x as fast as the static one: (\d+)% of what", text).groups()
    assert float(speedup) == pytest.approx(static / planned, abs=6e-3)
    assert int(share) / 100 == pytest.approx((static - planned) / (static - balanced), abs=6e-3)
    quartiles = re.search(r"^ *quartiles +(.+)$", text, re.MULTILINE)[1]
    for median, low, high in zip(row(r"step time, median \(measured\)", " s"), *_pairs(quartiles), strict=True):
        assert low <= median <= high


def _pairs(quartiles):
    found = re.findall(r"([\d.]+)-([\d.]+) s", quartiles)
    assert len(found) == 3
    return zip(*((float(low), float(high)) for low, high in found), strict=True)


# what is said on several pages -> a pattern with one group
SHARED = {
    "equal top-k sets of aligned records": r"(98 to 100) %",
    "the paper's share of balanced": r"(?:\b|0\.)(90-0?\.?94)\b",
    "UltraEP's share of balanced": r"UltraEP[^|]*(?:\|[^|]*){0,2}\| (94\.3 %|0\.943)",
    "our max/mean": r"max/mean[^|]{0,40}<= (1\.\d+)",
}


@pytest.mark.parametrize("what", SHARED)
def test_pages_say_the_same(what):
    said = {}
    for name, text in PAGES.items():
        for figure in re.findall(SHARED[what], re.sub(r"\s+", " ", text)):
            digits = re.sub(r"0\.|[. %]", "", figure)  # 94.3 % and 0.943 are the same
            said.setdefault(digits, set()).add(name)
    assert len(said) == 1, said
    assert len(next(iter(said.values()))) >= 2, said


def test_the_simulators_constants_are_those_of_the_code():
    text = PAGES["simulator.md"]
    h100 = find_device("8xH100")

    def cell(label):
        return re.search(rf"^\| {re.escape(label)}[^|]*\| ([^|]+)\|", text, re.MULTILINE)[1]

    assert f"fixed**: {h100.layer_seconds * 1e6:.0f} us" in text
    assert _near(cell("inside a node"), 0.78, h100.fast)
    assert _near(cell("between nodes"), 0.84, h100.slow)
    assert cell("launch of an all-to-all").split() == (
        f"{h100.launch_fast * 1e6:.0f} us in a node, {h100.launch_slow * 1e6:.0f} us across".split()
    )
    assert f"{h100.transfer_launch * 1e6:.0f} us a launch" in cell("transfer beside compute")
    assert h100.contention == 0.1 and cell("transfer beside compute").startswith("a tenth of its time")
    shape = find_model("Qwen3-30B-A3B")
    size = shape.hidden_size * shape.intermediate_size
    assert cell("kept replica") == f"{shape.copy_bytes // size} * H * I bytes "
    assert cell("migration") == f"{shape.migration_bytes // shape.expert_parameters} bytes a parameter "


def _near(cell, share, rate):
    """`0.84 of nominal (42 GB/s a GPU)`."""
    said = re.match(r"([\d.]+) of nominal \((\d+) GB/s", cell)
    return float(said[1]) == share and abs(int(said[2]) * 1e9 / rate - 1) < 0.02


def test_numbers_of_things_are_those_of_the_code():
    assert f"one of {len(MODELS)} models" in PAGES["planner.md"]
    gpus = sorted(path.name for path in (ROOT / "autotune_configs").iterdir() if (path / "gate_up.json").exists())
    assert set(gpus) == {name.removeprefix("8x") for name in DEVICES if name.startswith("8x")}
    listed = re.search(r"Kernel configs for ([\w, \n]+?) come with the package", PAGES["README.md"])[1]
    assert sorted(re.split(r",\s*|\s+and\s+", listed)) == gpus
    assert f"compiled for {len(gpus)} GPUs" in PAGES["paths.md"]
    assert f"{SEQUENCE_LENGTH} tokens a sequence" in PAGES["planner.md"]


def test_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in PAGES["README.md"]
    needed = " ".join([*project["dependencies"], *project["optional-dependencies"]["transformers"]])
    for name, page in (("torch", "versions.md"), ("triton", "versions.md"), ("transformers", "versions.md")):
        oldest = re.search(rf"{name}>=([\d.]+)", needed)[1]
        assert oldest in PAGES[page], (name, oldest)


def test_the_gates_limit_is_that_of_the_script():
    limit = re.search(r"of (\d+)\\n", (ROOT / ".ci" / "run").read_text())[1]
    assert f"a table of minutes, {limit} at most" in PAGES["CONTRIBUTING.md"]


def test_every_rival_says_what_it_needs_and_where_that_is_said():
    """With a link, or the reason why there is none; what to use instead comes first."""
    page = PAGES["comparison.md"]
    assert page.index("## When to use something else") < page.index("## Balancing") < page.index("## Kernels")
    table = page.split("## Balancing")[1].split("## Kernels")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    named = {re.match(r"(?:Megatron )?[\w-]+", cells[0])[0]: cells for cells in rows}
    rivals = (
        "MoonEP",
        "UltraEP",
        "Megatron ECHO",
        "ForeMoE",
        "LAER-MoE",
        "RoutePack",
        "LLEP",
        "EPLB",
        "LPLB",
        "ReLibra",
    )
    for rival in rivals:
        assert len(named[rival]) == 4 and all(named[rival]), rival
        assert "https://" in named[rival][0] or "could not be read" in named[rival][0], rival
    assert re.search(r"^\| LigerCute \(\[\d+\]\(https://", page, re.MULTILINE)


@pytest.mark.parametrize("page", [name for name in PAGES if name != "api.md"])
def test_a_table_has_as_many_cells_in_every_row(page):
    """A row that lost a cell shows its figures under the wrong heading."""
    width = None
    for line in re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line).strip().strip("|")))
        assert width in (None, cells), (page, line)
        width = cells
