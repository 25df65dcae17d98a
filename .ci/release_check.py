"""Check what would be released: `make release-check`, with the wheel and the sdist in dist/.

The metadata name one version, the one of the CHANGELOG. The wheel, which was built from the sdist, holds types, licence
and configs, and it imports beside a decoy `planner.py`. mypy sees its public names. The API page is up to date.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = """
import pathlib, sys
import relibra_kernels.planner
import relibra_kernels.autotune_configs
assert pathlib.Path(relibra_kernels.__file__).is_relative_to(pathlib.Path("venv").resolve()), relibra_kernels.__file__
assert "torch" not in sys.modules and "triton" not in sys.modules
import relibra_kernels.nn
"""
USERS_FILE = "from relibra_kernels import ClusterSpec\nreveal_type(ClusterSpec(1, 8).num_ranks)\n"


def run(*command: str, cwd: Path = ROOT, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def one_of(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        sys.exit(f"dist/ holds {[path.name for path in found]}; it must hold one {pattern}")
    return found[0]


def check_metadata(wheel: Path, sdist: Path) -> str:
    """The version, which all places must share."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    version = re.search(r"^Version: (.+)$", text, re.MULTILINE)[1]
    written = re.search(r'^__version__ = "(.+)"$', (ROOT / "relibra_kernels/__init__.py").read_text(), re.MULTILINE)[1]
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert version == written == changes, f"versions differ: wheel {version}, package {written}, CHANGELOG {changes}"
    assert sdist.name == f"relibra_kernels-{version}.tar.gz", sdist.name
    for field in ("Summary", "License-Expression", "Requires-Python", "Project-URL", "Description-Content-Type"):
        assert re.search(rf"^{field}: \S", text, re.MULTILINE), f"the metadata have no {field}"
    for part in ("relibra_kernels/py.typed", "relibra_kernels/planner/plan.py", "licenses/LICENSE"):
        assert any(name.endswith(part) for name in names), f"the wheel has no {part}"
    assert sum(name.startswith("relibra_kernels/autotune_configs/") for name in names) > 10, "the wheel has no configs"
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("relibra_kernels/planner/plan.py") for name in archive.getnames()), "sdist: no planner"
    return version


def check_installed(wheel: Path) -> None:
    """It imports beside another `planner`, its planner needs neither torch nor triton, and mypy knows its types."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv")
        site = next((folder / "venv").glob("lib/python*/site-packages"))
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
        run(*pip, "--target", str(site), str(wheel))
        (folder / "planner.py").write_text('raise ImportError("the decoy planner.py was imported")')
        run(sys.executable, "-c", IMPORTS, cwd=folder, path=str(site))
        (folder / "theirs.py").write_text(USERS_FILE)
        theirs = ("--python-executable", str(folder / "venv/bin/python"), "theirs.py")
        assert 'Revealed type is "int"' in run(sys.executable, "-m", "mypy", *theirs, cwd=folder)


def check_docs() -> None:
    before = (ROOT / "docs/api.md").read_text()
    run(sys.executable, "docs/make_api.py", path=str(ROOT))
    if (ROOT / "docs/api.md").read_text() != before:
        sys.exit("docs/api.md was not up to date; it is now: commit it")


if __name__ == "__main__":
    wheel, sdist = one_of("*.whl"), one_of("*.tar.gz")
    version = check_metadata(wheel, sdist)
    check_docs()
    check_installed(wheel)
    print(f"{wheel.name} and {sdist.name}: version {version}, metadata, types and docs are right")
