"""Everything to know about the kernels on this GPU, in half an hour: one JSON line a case, then a table.

    python bench/gpu.py [STAGE...] [--seconds N] [--only TEXT] [--rehearse]

Stages: smoke (it runs), correct (against float64), kernels, layer and step (times), tune (configs); all of them where
none is named. Results are appended to `results.jsonl` in the folder that $OUT names, else in gpu-results/; everything
else is packed into one archive beside it. Every case has a process and a limit of its own: what crashes, hangs or does
not compile loses nothing but itself. Installs nothing.

Exit status: 0 when all stages ran, 1 where a case is wrong, 2 where there is no GPU, 3 where cases were not reached.
`--rehearse` needs no GPU: tiny sizes in Triton's interpreter on a clock that makes its times up; 1 where a case is not
what a rehearsal expects, its deliberate failures included.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from gpu_stages.case import CRASHED, MISSING, NOT_REACHED, OK, STAGES, WRONG, Case, Result, empty, results_of
from gpu_stages.runner import Runner
from gpu_stages.table import tables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--seconds", type=float, help="of all stages named; default: their shares of 28 minutes")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--whole", action="store_true", help="rehearse every case, which takes some ten minutes")
    args = parser.parse_args()
    stages = args.stages or list(STAGES)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"STAGE is {unknown[0]!r}; it must be one of {', '.join(STAGES)}")
    device = "rehearsal" if args.rehearse else gpu_name()
    if not device:
        print("there is no GPU here (neither nvidia-smi nor torch names one); --rehearse needs none", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or "gpu-results")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory(prefix="gpu-cases-", ignore_cleanup_errors=True) as work:
        runner = Runner(
            out / "results.jsonl", Path(work), rehearse=args.rehearse, device=device,
            at_once=2 if args.rehearse else max(1, min(6, (os.cpu_count() or 1) // 2)), done=_print,
        )  # fmt: skip
        try:
            _run_stages(
                runner,
                stages,
                args.seconds,
                lambda case: args.only in case.name and (not args.rehearse or args.whole or case.rehearsed),
            )
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        finally:
            runner.close()
            _pack(out, Path(work))
    text = tables(results_of(out / "results.jsonl"))
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return _verdict(runner.results, rehearse=args.rehearse)


def _run_stages(runner: Runner, stages: list[str], seconds: float | None, wanted: Callable[[Case], bool]) -> None:
    """What a stage leaves of its share is for those after it."""
    share = 1.0 if seconds is None else seconds / sum(STAGES[stage] for stage in stages)
    until = time.monotonic()
    for stage in stages:
        until += STAGES[stage] * share
        try:
            listed = importlib.import_module(f"gpu_stages.{stage}").cases(runner.rehearse)
        except Exception as error:  # a stage that cannot be listed must not take the others with it
            runner.add(Case(stage, ""), Result(stage, stage, CRASHED, 0, runner.device, {}, repr(error)))
            continue
        runner.run(stage, list(filter(wanted, listed)), until)
        _pack(runner.path.parent, runner.work)


def gpu_name() -> str:
    """Of the first GPU, by the driver, else by torch; empty where there is none."""
    ask_torch = "import torch; print(torch.cuda.get_device_name(0))"
    for command in (
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", "0"],
        [sys.executable, "-c", ask_torch],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[-1]
    return ""


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print(result: Result) -> None:
    error = f"  {result.error.splitlines()[0][:150]}" if result.error else ""
    print(f"{result.stage:8} {result.case:44} {result.status:12} {result.seconds:6.1f} s{error}", flush=True)


def _pack(out: Path, work: Path) -> None:
    """Logs, traces and configs beside the results, in one file."""
    try:
        with tarfile.open(out / "gpu-results.tar.gz", "w:gz", compresslevel=3) as archive:
            for path in sorted((*work.rglob("*"), out / "results.jsonl")):
                if path.is_file() and path.stat().st_size < 1 << 25:
                    archive.add(path, arcname=path.name if path.parent == out else str(path.relative_to(work)))
    except OSError as error:
        print(f"not packed: {error}", file=sys.stderr)


def _verdict(results: list[tuple[Case, Result]], *, rehearse: bool) -> int:
    counts: dict[str, int] = {}
    for _, result in results:
        counts[result.status] = counts.get(result.status, 0) + 1
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if rehearse:
        faults = [fault for case, result in results for fault in _faults(case, result)]
        for fault in faults:
            print(fault, file=sys.stderr)
        return 1 if faults or not results else 0
    if counts.get(WRONG):
        return 1
    return 3 if counts.get(NOT_REACHED) or not results else 0


def _faults(case: Case, result: Result) -> Iterator[str]:
    """What is not as a rehearsal expects it."""
    where = f"{result.stage} {case.name}"
    if result.status != case.expect and not (case.may_miss and result.status == MISSING):
        yield f"{where}: {result.status} instead of {case.expect}: {result.error}"
    elif result.status == OK:
        yield from (f"{where}: the figure {name} is empty" for name in empty(result.figures))


if __name__ == "__main__":
    sys.exit(main())
