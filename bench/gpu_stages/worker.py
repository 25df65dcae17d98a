"""The process of one case: `python -m gpu_stages.worker REPORT`, the case as one JSON line on standard input.

What is found goes to REPORT line by line, so that it outlives the process.
"""

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .case import CRASHED, MISSING, NOT_COMPILED, OK, TIMEOUT, WRONG, Missing, Wrong, plain

_COMPILER = {
    "CompilationError",
    "CompileTimeAssertionFailure",
    "OutOfResources",
    "PTXASError",
    "UnsupportedLanguageConstruct",
}
_OURS = ("relibra_kernels", "gpu_stages", "torch", "triton", "numpy", "models", "peers")


class Report:
    """What a case says while it runs."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, **entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def figures(self, **figures: Any) -> None:
        """Keep these; a later one of the same name replaces an earlier one."""
        self.say(figures=plain(figures))

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """A process that ends within did not compile `what`."""
        self.say(compiling=what)
        yield
        self.say(compiling="")


def status_of(error: BaseException) -> str:
    """What became of a case that raised."""
    if isinstance(error, Wrong | AssertionError):
        return WRONG
    if isinstance(error, Missing):
        return MISSING
    if isinstance(error, subprocess.TimeoutExpired):
        return TIMEOUT
    if isinstance(error, ImportError):
        return CRASHED if (error.name or "").split(".")[0] in _OURS else MISSING
    chain, one = [], error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__  # type: ignore[assignment]
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if names & _COMPILER or "PassManager::run failed" in str(error):
        return NOT_COMPILED
    return CRASHED


def _import_all() -> str:
    """What every case needs; why it cannot be imported."""
    try:
        for name in ("torch", "triton", "relibra_kernels.nn", "relibra_kernels.kernels", "gpu_stages.setting"):
            importlib.import_module(name)
    except BaseException:
        return traceback.format_exc()
    return ""


def main() -> None:
    faulthandler.enable()
    report = Report(Path(sys.argv[1]))
    fault = _import_all()
    line = sys.stdin.readline()
    if not line:  # nobody needed it
        os._exit(0)
    request = json.loads(line)
    print(request["stage"], request["case"], flush=True)
    report.say(ready=True)
    faulthandler.dump_traceback_later(max(request["limit"] - 1, 0.5))
    if fault:
        report.say(status=CRASHED, error=fault[-1400:])
        os._exit(1)
    try:
        from .setting import Setting

        setting = Setting(report, request["rehearse"], request["known"], Path(request["work"]))
        report.say(device=setting.name)
        module, _, name = request["function"].rpartition(".")
        function = getattr(importlib.import_module(f"gpu_stages.{module or request['stage']}"), name)
        function(setting, **request["options"])
        setting.synchronize()
        report.say(status=OK, error="")
    except BaseException as error:
        traceback.print_exc()
        first = f"{type(error).__name__}: {error}".strip()
        report.say(status=status_of(error), error=(first if len(first) < 700 else f"{first[:300]} ... {first[-400:]}"))
    sys.stdout.flush()
    os._exit(0)  # not through the teardown of a GPU that may be lost


if __name__ == "__main__":
    main()
