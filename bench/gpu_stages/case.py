"""What a case is, what can become of it, and how it is written down."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# stage -> seconds of its share of half an hour
STAGES = {"smoke": 300, "correct": 300, "kernels": 240, "layer": 240, "tune": 480, "step": 120}

OK, WRONG, CRASHED, TIMEOUT = "ok", "wrong", "crashed", "timeout"
NOT_COMPILED, MISSING, NOT_REACHED = "not_compiled", "missing", "not_reached"
STATUSES = (OK, WRONG, CRASHED, TIMEOUT, NOT_COMPILED, MISSING, NOT_REACHED)


class Wrong(Exception):  # noqa: N818 (a result, not a fault of the program)
    """A figure is not what it must be."""


class Missing(Exception):  # noqa: N818
    """This machine lacks what the case needs."""


@dataclass(frozen=True)
class Case:
    """One thing to find out, by `function` of the module of its stage, or by `module.function`.

    Attributes:
        options: keyword arguments of the function, as JSON can say them.
        seconds: after which its process is ended.
        beside: may run while other cases do: nothing is timed.
        env: variables of its process.
        expect: what must become of it in a rehearsal; `missing` is allowed where `may_miss`.
        rehearsed: is part of every rehearsal, not only of a whole one.
    """

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 60
    beside: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    expect: str = OK
    may_miss: bool = False
    rehearsed: bool = True


@dataclass(frozen=True)
class Result:
    """One line of `results.jsonl`."""

    stage: str
    case: str
    status: str
    seconds: float
    device: str
    figures: dict[str, Any]
    error: str

    def line(self) -> str:
        return json.dumps({**vars(self), "seconds": round(self.seconds, 2)})


def plain(value: Any) -> Any:
    """What JSON can say: three to six digits of a float, None for what is no number."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def empty(figures: Mapping[str, Any]) -> list[str]:
    """The names of figures that say nothing; all of them where there is none."""
    if not figures:
        return ["(all)"]
    found = []
    for name, value in figures.items():
        inner = value if isinstance(value, list) else [value]
        if value is None or value == "":
            found.append(name)
        found += [f"{name}.{of}" for item in inner if isinstance(item, dict) and item for of in empty(item)]
    return found


def results_of(path: Path) -> list[Result]:
    """The last result of every case in a file, in the order of their first; a line that was cut off is left out."""
    found: dict[tuple[str, str], Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[result.stage, result.case] = result
    return list(found.values())
