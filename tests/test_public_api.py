"""The public names: how they are imported and typed, that the docs use each, and that signatures stay readable."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from house import source_files

import relibra_kernels
from relibra_kernels.planner.errors import InputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "api")]
SOURCES = source_files()

# The operands of one operation: every tensor that it reads or writes, and how. Elsewhere eight parameters are enough.
OPERATIONS = ("kernels.", "reference.", "autograd", "compiled")
MORE_THAN_EIGHT = {  # why
    "configs.lookup config_of": "the key of a config",
    "router TopKRouter.__init__": "the router's settings, named as the models' configs name them",
}


def test_every_public_name_is_there():
    for name in relibra_kernels.__all__:
        assert getattr(relibra_kernels, name) is not None
    assert set(relibra_kernels.__all__) <= set(dir(relibra_kernels))
    with pytest.raises(AttributeError, match="no attribute 'ExpertParalel'"):
        _ = relibra_kernels.ExpertParalel


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse((ROOT / "relibra_kernels" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    lazy = relibra_kernels._MODULE_OF
    assert seen == lazy
    assert {"__version__", *lazy} == set(relibra_kernels.__all__)


USERS_FILE = """
from relibra_kernels import ExpertParallel, ClusterSpec, RoutingTrace, plan_batch, warmup
reveal_type(ExpertParallel)
reveal_type(ClusterSpec(1, 8).num_ranks)
reveal_type(plan_batch)
reveal_type(ExpertParallel.stats_line)
warmup(object(), "8")
ClusterSpec("one", 8)
import relibra_kernels
relibra_kernels.ExpertParalel
"""


def test_a_users_file_is_checked(tmp_path):
    """mypy on a file of another project; without torch and numpy, which say nothing about our names."""
    pytest.importorskip("mypy", reason="needs mypy")
    (tmp_path / "theirs.py").write_text(USERS_FILE)
    skipped = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "numpy", "triton", "transformers")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT}\n{skipped}")
    command = [sys.executable, "-m", "mypy", "--cache-dir", "cache", "theirs.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = dict(re.findall(r"^theirs\.py:(\d+): (?:note|error): (.*)$", done.stdout, re.MULTILINE))
    assert done.returncode == 1 and set(found) == {"3", "4", "5", "6", "7", "8", "10"}, done.stdout + done.stderr
    assert re.match(r'Revealed type is "def \(model: .*, cluster: .*ClusterSpec, .*ExpertParallel"', found["3"])
    assert found["4"] == 'Revealed type is "int"'
    assert "BatchPlan" in found["5"] and '-> str"' in found["6"]
    assert 'Argument 1 to "ClusterSpec" has incompatible type "str"' in found["8"]
    assert 'Module has no attribute "ExpertParalel"' in found["10"]


def test_types_and_version_are_shipped():
    assert (ROOT / "relibra_kernels" / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["relibra_kernels"] == ["py.typed"]
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert re.search(
        rf"^## {re.escape(relibra_kernels.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_every_public_name_is_used_in_the_docs():
    code = "".join(
        block for page in PAGES for block in re.findall(r"^```python[^\n]*\n(.*?)^```$", page.read_text(), re.M | re.S)
    )
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert set(relibra_kernels.__all__) <= used, set(relibra_kernels.__all__) - used


def functions():
    """(module, qualified name, node) of every function of the product, kernels apart."""
    for module, source in SOURCES.items():
        tree = ast.parse(source)
        for owner in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
            prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                    yield module, prefix + node.name, node


def test_a_function_has_at_most_eight_parameters():
    long = set()
    for module, name, node in functions():
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([p for p in parameters if p not in ("self", "cls", "ctx")]) > 8:
            long.add(f"{module} {name}")
    assert {name for name in long if not name.startswith(OPERATIONS)} == set(MORE_THAN_EIGHT)


def hidden_arguments(node):
    """The dicts that a function makes, or annotates as `dict[str, Any]`, and splats into a call.

    Left out are calls that take values by name: constants of kernels, counts of outcomes or machine code, named tuples.
    """
    dicts = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.AnnAssign) and "dict[str, Any]" in ast.unparse(inner.annotation):
            dicts.add(ast.unparse(inner.target))
        elif isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Dict):
            dicts.update(ast.unparse(target) for target in inner.targets)
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    calls = [
        call
        for call in calls
        if not ast.unparse(call.func).endswith(("launch", "MachineCode", "Outcome.of", "._replace"))
    ]
    splats = {ast.unparse(k.value) for call in calls for k in call.keywords if k.arg is None}
    return sorted(dicts & splats)


def test_no_call_hides_its_arguments_in_a_dict():
    hidden = {f"{module} {name}": found for module, name, node in functions() if (found := hidden_arguments(node))}
    assert hidden == {}
    changed = ast.parse(
        "def f(x):\n    how = {'a': 1}\n    more: dict[str, Any] = {}\n    return g(x, **how, **more)\n"
    )
    assert hidden_arguments(changed) == ["how", "more"]


def test_warmup_takes_a_gpu_by_name_and_says_which_there_are():
    torch = importlib.import_module("torch")
    here = {"dtype": torch.bfloat16, "device": "meta"}
    router = relibra_kernels.TopKRouter(32, 4, 2, **here)
    layer = relibra_kernels.ReplicatedMoE(router, relibra_kernels.ReplicatedExperts(4, 32, 16, **here))
    with pytest.raises(InputError, match=r"'RTX', but must be one of .*H100"):
        relibra_kernels.warmup(layer, 8, device="RTX")
