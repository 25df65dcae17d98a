"""`relibra watch`: a training run in the terminal, from the lines of `ep.stats_line()` that it logs."""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHOWN = 12  # newest batches on a screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="RUN.jsonl", type=Path, help="a line of JSON a batch, as ep.stats_line() gives")
    parser.add_argument("--once", action="store_true", help="show what is there and end, instead of following")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between looks; default 1")


def run(args: argparse.Namespace) -> int:
    from ..planner.errors import FormatError, InputError

    if args.every <= 0:
        raise InputError(f"--every is {args.every}, but must be positive")
    if not args.log.is_file():
        raise FormatError(f"{args.log}: no such file")
    shown = 0
    while True:
        batches = list(batches_of(args.log))
        if len(batches) > shown or args.once:
            print("\n".join(lines_of(batches, shown)), flush=True)
            shown = len(batches)
        if args.once:
            return 0
        time.sleep(args.every)


def batches_of(path: Path) -> Iterator[dict[str, Any]]:
    """The log's JSON objects with a batch's figures. Other lines are skipped; an unfinished last one waits."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "planned_max_mean" in found:
            yield found


def lines_of(batches: list[dict[str, Any]], shown: int = 0) -> list[str]:
    """A line a batch that was not shown yet, under headings where none were; the newest where there are many."""
    if not batches:
        return ["no batch yet: the log has no line of ep.stats_line()"]
    lines = []
    if not shown:
        lines.append(
            f"{'batch':>6} {'rank':>4} {'static':>7} {'planned':>7} {'actual':>7} {'saved s':>7} "
            f"{'seconds':>8} {'exchange':>8} {'replicas':>8} {'moves':>7} {'MB fast':>8} {'MB slow':>8} "
            f"{'deviating':>9}"
        )
    first = max(shown, len(batches) - _SHOWN)
    if first > shown:
        lines.append(f"... {first - shown} batches before")
    return lines + [_line(number, batches[number]) for number in range(first, len(batches))]


def _line(number: int, stats: dict[str, Any]) -> str:
    def total(unit: str) -> float:
        return sum(float(value) for name, value in stats.items() if name.endswith(unit) and name != "saved_seconds")

    def shown(name: str, width: int = 7) -> str:
        value = stats.get(name)
        return "-".rjust(width) if value is None else f"{value:>{width}.3f}"

    exchange = sum(stats.get(f"{part}_seconds", 0.0) for part in ("dispatch", "combine"))
    return (
        f"{number:>6} {stats.get('rank', 0):>4} {shown('static_max_mean')} {shown('planned_max_mean')} "
        f"{shown('actual_max_mean')} {shown('saved_seconds')} {total('_seconds'):>8.3f} {exchange:>8.3f} "
        f"{shown('replica_seconds', 8)} {shown('migration_seconds')} {total('_fast_bytes') / 1e6:>8.1f} "
        f"{total('_slow_bytes') / 1e6:>8.1f} {stats.get('differing_tokens', 0):>9}"
    )
