"""Imports run downward through the rooms of `house.ROOMS`, in functions too, and nothing imports in a circle."""

import pytest
from house import (
    PICTURE,
    ROOMS,
    ROOT,
    Room,
    computed_imports,
    cycles,
    faults,
    file_graph,
    imports,
    picture,
    room_graph,
    source_files,
)

SOURCES = source_files()


def test_every_import_is_one_the_table_allows():
    assert len(SOURCES) > 100
    assert faults(SOURCES) == []


def test_the_table_runs_downward():
    names = [room.name for room in ROOMS]
    assert len(set(names)) == len(names)
    for position, room in enumerate(ROOMS):
        assert set(room.uses.split()) <= set(names[position + 1 :]), room.name


def test_nothing_imports_in_a_circle():
    assert cycles(file_graph(SOURCES)) == []
    assert cycles(room_graph(SOURCES)) == []


def test_every_room_has_files():
    assert {room.name for room in ROOMS} == set(room_graph(SOURCES))
    for room in ROOMS:
        for name in (room.files or room.name).split():
            assert name in SOURCES, name


def test_the_planner_imports_relatively():
    for module, source in SOURCES.items():
        if module.startswith("planner"):
            assert "import relibra_kernels" not in source and "from relibra_kernels" not in source, module


def test_contributing_shows_the_table():
    shown = PICTURE.search((ROOT / "CONTRIBUTING.md").read_text())
    assert shown and shown.group() == picture(), "run python tests/support/house.py"


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("kernels.swiglu", "from ..tuning import catalogue", "kernels.swiglu imports tuning.catalogue"),
        ("kernels.swiglu", "def later():\n    from ..compiling import compile_only", "kernels may not use compiling"),
        ("planner.pricing.cost", "from ..solver.search import plan_layers", "pricing may not use solver"),
        ("planner.pricing.cost", "from ... import autograd", "pricing may not use autograd"),
        ("parallel.experts.replicas", "from ..tokens.layer import LayerSite", "parallel.experts may not use"),
        ("nn", "import relibra_kernels.parallel", "nn imports parallel: nn may not use parallel"),
        ("kernels.swiglu", "import_module('relibra_kernels.tuning.catalogue')", "kernels may not use tuning"),
        ("planner.pricing.cost", "import_module('..solver.search', __package__)", "pricing may not use solver"),
        ("parallel.batch", "NAMES = {'hf': 'relibra_kernels.integrations.verl'}", "parallel may not use integrations"),
        ("reference.unpermute", "from .. import kernels", "reference may not use kernels"),
    ],
)
def test_an_import_upward_is_found(module, line, fault):
    changed = {**SOURCES, module: f"{SOURCES[module]}\n{line}\n"}
    found = faults(changed)
    assert len(found) == 1 and fault in found[0], found


def test_names_of_modules_are_computed_in_the_cli_alone():
    """The cli imports its own commands. A name that is computed elsewhere would hide an import from this test."""
    assert computed_imports(SOURCES).keys() == {"cli"}
    changed = {"kernels.swiglu": "import importlib\nimportlib.import_module(TABLE['tuning'])\n"}
    assert computed_imports(changed) == {"kernels.swiglu": ["TABLE['tuning']"]}


def test_a_file_without_a_room_is_found():
    assert "new is in no room" in faults({**SOURCES, "new": ""})[0]
    assert "planner.new is in no room" in faults({**SOURCES, "planner.new": ""})[0]
    assert faults({**SOURCES, "kernels.new": "", "cli.demo.new": ""}) == []


def test_what_counts_as_an_import():
    sources = {
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\nelse:\n    from .c import C\n",
        "b": "import numpy\nfrom .d import e, name\nfrom . import c\nwith open(name):\n    import relibra_kernels.a\n",
        "c": "class C:\n    def f(self):\n        from relibra_kernels.d import name\n",
        "d": "from .e import name\n",
        "d.e": "from ..c import C\nfrom . import name\nfrom .. import b\n",
    }
    found = {module: sorted(set(imports(module, sources))) for module in sources}
    assert found == {"a": ["c"], "b": ["a", "c", "d", "d.e"], "c": ["d"], "d": ["d.e"], "d.e": ["b", "c", "d"]}


def test_circles_are_found():
    sources = {
        "a": "from . import b",
        "b": "def f():\n    from .c import d",
        "c": "from .a import x",
        "d": "from .a import x",
    }
    assert cycles(file_graph(sources)) == [["a", "b", "c"]]
    rooms = (Room("one", "", "two", "a c"), Room("two", "", "", "b"))
    assert cycles(room_graph({k: sources[k] for k in "abc"}, rooms)) == [["one", "two"]]
