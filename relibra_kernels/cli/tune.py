"""`relibra tune`: configs for a GPU, measured where it is here, else compiled and ranked by a model."""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..planner.errors import InputError
from .inputs import SHAPE_HELP, naming_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..configs.products import PRODUCTS
    from ..tuning.catalogue import PARTS
    from ..tuning.models import MODELS

    what = parser.add_mutually_exclusive_group()
    names = ", ".join(map(str, MODELS))
    what.add_argument("--model", action="append", default=[], help=f"'all' or one of {names}; may be repeated")
    what.add_argument("--shape", help=f"{SHAPE_HELP}: hidden and intermediate size, experts, experts a token")
    parser.add_argument(
        "--form", choices=["plain", "gpt-oss"], help="of --shape's weights; default: the model's, or plain"
    )
    parser.add_argument("--device", default="auto", help=f"auto: the GPU that is here; or one of {', '.join(PRODUCTS)}")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[], help="of a micro-batch on a rank; default: a grid of rows a slot"
    )
    parser.add_argument(
        "--kernel", action="append", choices=PARTS, help="only this one, as after a change of it; may be repeated"
    )
    parser.add_argument("--trace", type=Path, help="recorded routing (.npz) to take uneven groups from")
    parser.add_argument("--budget", type=float, help="seconds, after which no further candidate is started")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run was stopped")
    parser.add_argument("--out", type=Path, help="folder of configs; default: the one that is looked up first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument(
        "--check", action="store_true", help="tune nothing: check the config files of --out, or shipped"
    )
    parser.add_argument(
        "--import",
        type=Path,
        dest="results",
        help="tune nothing: write what `bench/gpu.py tune` measured (results.jsonl)",
    )
    parser.add_argument("--sample", type=int, help="of --check: compile only so many configs")
    parser.add_argument("--seed", default="", help="of --sample: which ones")


def run(args: argparse.Namespace) -> int:
    """0 when done; 1 where --check finds a fault; 3 when stopped before the end."""
    if args.jobs < 1 or (args.budget is not None and not args.budget > 0):
        raise InputError(f"--jobs is {args.jobs} and --budget {args.budget}; both must be positive")
    if args.check:
        return _check(args)
    if args.results is not None:
        return _import(args)
    if any(count < 1 for count in args.tokens):
        raise InputError(f"--tokens is {args.tokens}; they must be positive")
    models = _models(args)
    product, here = _device(args.device)
    trace = None
    if args.trace is not None:
        from ..planner import RoutingTrace

        trace = RoutingTrace.load(args.trace)
    from ..tuning.catalogue import PARTS
    from ..tuning.search_goal import goals

    found = [goal for model in models for goal in goals(model, args.tokens, trace, args.kernel or tuple(PARTS))]
    if here:
        return _measure(args, product, found)
    return _offline(args, product, models, found)


def _models(args: argparse.Namespace) -> list:
    from ..form import GPT_OSS, ExpertForm
    from ..tuning.models import MODELS, model_named

    if args.shape is not None:
        with naming_flags():
            return [model_named(args.shape, {"plain": ExpertForm(), "gpt-oss": GPT_OSS, None: None}[args.form])]
    if args.model == ["all"]:
        return list(MODELS)
    if not args.model:
        raise InputError("neither --model nor --shape is given; one of them must be")
    with naming_flags(model="--model"):
        return [model_named(name) for name in args.model]


def _device(name: str) -> tuple:
    """(what to tune for, whether it is here)."""
    import torch

    from ..configs.limits import device_of
    from ..configs.products import PRODUCTS, product_named

    there = device_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if name == "auto":
        if there is None:
            raise InputError(f"device is 'auto', but there is no GPU here; name one of {', '.join(PRODUCTS)}")
        return there, True
    product = product_named(name)
    return (there, True) if there is not None and there.product == product.name else (product, False)


def _offline(args: argparse.Namespace, product: Any, models: list, found: list) -> int:
    from ..configs.files import user_folder
    from ..progress import Progress
    from ..tuning.reports import Reports
    from ..tuning.search import OfflineSearch

    out = args.out or user_folder()
    end = None if args.budget is None else time.monotonic() + args.budget
    reports = Reports(state_folder(out), product.target, fresh=not args.resume)
    search = OfflineSearch(product, models, found, reports, args.jobs)
    search.seconds_up = lambda: end is not None and time.monotonic() > end
    left = len(reports.missing(search.tasks()))
    print(
        f"no {product.name} here: compiling {left} candidates for {product.target}, ranking them by a model", flush=True
    )
    status = 3  # where time was up
    try:
        with Progress(f"tune {product.name}", left) as bar:
            search.done = lambda task, outcome: bar.step(search.best_note(task) if sys.stderr.isatty() else "")
            entries = search.run()
    except KeyboardInterrupt:
        entries, status = None, 130
    if entries is None:
        print(
            f"stopped with {len(reports.missing(search.tasks()))} candidates left; go on with --resume", file=sys.stderr
        )
        return status
    _write(out, product.name, entries, whole=not args.tokens)
    if search.failed:
        print(f"{len(search.failed)} candidates did not compile; the first: {next(iter(search.failed.items()))}")
    return 0


def _measure(args: argparse.Namespace, device: Any, found: list) -> int:
    import datetime

    import triton

    from ..configs.files import user_folder
    from ..progress import Progress
    from ..tuning import measured_inputs as workloads
    from ..tuning.journal import Journal
    from ..tuning.measure import OnlineSearch

    out = args.out or user_folder()
    end = None if args.budget is None else time.monotonic() + args.budget
    journal = Journal(state_folder(out) / f"{device.product}-measured.jsonl", fresh=not args.resume)
    search = OnlineSearch(device, found, journal, workloads.prepare, workloads.bench)
    search.out_of_time = lambda: end is not None and time.monotonic() > end
    total = sum(len(search.candidates(goal)) for goal in found)
    print(f"timing up to {total} configs for {len(found)} launches on this {device.product}", flush=True)
    try:
        with Progress(f"tune {device.product}", total) as bar:
            search.done = lambda what, best: bar.step(f"{what}; best {best}")
            entries, left = search.run(triton.__version__, workloads.driver_version(), str(datetime.date.today()))
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    _write(out, device.product, entries)
    for name, why in search.failed.items():
        print(f"not timed: {name}: {why}", file=sys.stderr)
    if left:
        print(f"stopped with {left} of {len(found)} launches left; go on with --resume", file=sys.stderr)
    return 3 if left else 0


def _write(out: Path, device: str, entries: dict, *, whole: bool = False) -> None:
    from ..configs import lookup
    from ..configs.config import parse_config
    from ..configs.files import merged, path_of, update

    for kernel, found in entries.items():
        path, new = path_of(out, device, kernel), merged([], found)
        update(path, device, kernel, partial(merged, new=new, whole=whole))
        configs = {parse_config(bucket.config) for entry in new for bucket in entry.buckets}
        buckets = sum(len(entry.buckets) for entry in new)
        print(f"{path}: {len(new)} entries, {buckets} buckets, {len(configs)} different configs")
    lookup.forget()


def _import(args: argparse.Namespace) -> int:
    from ..configs.files import user_folder
    from ..tuning.import_results import measured_entries

    for device, entries in measured_entries(args.results).items():
        _write(args.out or user_folder(), device, entries)
    return 0


def _check(args: argparse.Namespace) -> int:
    from ..configs.files import SHIPPED
    from ..configs.limits import device_named
    from ..progress import Progress
    from ..tuning.check_configs import check_folder, fault_of
    from ..tuning.compile_pool import compiled

    folder = args.out or SHIPPED
    check = check_folder(folder, sample=args.sample, seed=args.seed)
    faults = list(check.faults)
    with Progress(f"check {folder}", len(check.tasks)) as bar:
        for task, outcome in compiled(check.tasks, args.jobs, lambda: False):
            fault = fault_of(task, outcome, device_named(task.target))
            faults += [fault] if fault else []
            bar.step(f"{len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{folder}: {check.configs} configs read, {len(check.tasks)} launches compiled, {len(faults)} faults")
    return 1 if faults else 0


def state_folder(out: Path) -> Path:
    """Where what was compiled or timed so far is kept, for --resume."""
    return out / ".tune"
