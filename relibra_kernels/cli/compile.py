"""`relibra compile`: every kernel and config for a GPU that need not be here."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planner.errors import InputError

if TYPE_CHECKING:
    from ..tuning.compile_task import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..configs.limits import DEVICES
    from ..configs.products import PRODUCTS

    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", help=f"every kernel and config for one of {', '.join(DEVICES)}")
    names = ", ".join(PRODUCTS)
    what.add_argument("--device", help=f"what models' large batches get on one of {names}, and gates on the code")
    parser.add_argument("--model", action="append", default=[], help="of --device; may be repeated; default: all")
    parser.add_argument("--candidates", action="store_true", help="of --target: all that a search of a GEMM tries")
    parser.add_argument("--sample", type=int, help="of --candidates: only so many launches of a layer's")
    parser.add_argument("--seed", default="", help="of --sample: which ones")
    jobs = "of --device and --candidates: compilers at a time"
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help=jobs)
    parser.add_argument("--kernel", help="only this kernel")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of the tensors")
    parser.add_argument("--first", action="store_true", help="one config a kernel, the one chosen for large batches")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep IR, machine code and resources of each there")
    parser.add_argument("--json", action="store_true", help="also print a list of objects as the last line")


def run(args: argparse.Namespace) -> int:
    """1 where a launch spills registers, does not fit the device, meets a known bug or is another config's code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET is 1; compiling needs a process without it")
    if args.device is not None:
        if args.candidates:
            raise InputError(f"--candidates is given with --device {args.device}; it must be with --target")
        return _gate(args)
    if args.candidates:
        return _candidates(args)
    import torch

    from ..configs.config import GEMM_KERNELS
    from ..configs.limits import device_named

    device = device_named(args.target)
    from ..tuning.compile_matrix import KERNELS, reports
    from ..tuning.gates import same_code

    _check_kernel(args.kernel, KERNELS)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    columns = ("registers", "spill", "shared", "stages", "warps/SM", "mma", "tma", "async")
    print(f"{'kernel':18} {'config':18} {'variant':28} " + " ".join(f"{column:>9}" for column in columns))
    found, digests, bad = [], [], 0
    for name, config, variant, report in reports(device, dtype, args.kernel, first_only=args.first, dump=args.dump):
        facts = (report.registers, report.spill_bytes, report.shared_bytes, report.stages, report.warps_per_sm)
        loads = (str(report.mma or "-")[:9], report.tma, report.async_copies)
        print(f"{name:18} {config:18} {variant:28} " + " ".join(f"{fact:>9}" for fact in (*facts, *loads)), flush=True)
        figures = dataclasses.asdict(report)
        code = figures.pop("code")
        found.append({"kernel": name, "config": config, "variant": variant, **figures, **code})
        if name in GEMM_KERNELS:  # others clamp their blocks to a row
            digests.append((f"{report.kernel}, {variant}", config, report.code.digest))
        bad += report.spill_bytes > 0 or report.shared_bytes > device.shared_bytes or report.known_bug != ""
        if report.known_bug:
            print(report.known_bug, file=sys.stderr)
    if bad:
        print(
            f"{bad} of {len(found)} launches spill registers, exceed {device.shared_bytes} bytes or meet a bug",
            file=sys.stderr,
        )
    for pair in (same := same_code(digests)):
        print(f"the same code twice: {pair}", file=sys.stderr)
    if not bad and not same:
        print(f"{len(found)} launches compiled without spills")
    if args.json:
        print(json.dumps(found))
    return 1 if bad or same else 0


def _candidates(args: argparse.Namespace) -> int:
    """1 where two configs that a search tries for one launch are the same code."""
    from ..configs.config import GEMM_KERNELS
    from ..configs.limits import device_named
    from ..tuning.compile_matrix import candidate_tasks
    from ..tuning.compile_pool import compiled
    from ..tuning.gates import same_code

    _check_kernel(args.kernel, GEMM_KERNELS)
    _check_positive(jobs=args.jobs, sample=args.sample)
    tasks = candidate_tasks(device_named(args.target), args.kernel, sample=args.sample, seed=args.seed)
    codes = []
    for task, outcome in compiled(tasks, args.jobs, lambda: False):
        if isinstance(outcome, str):  # no candidate, then: a search leaves it out
            print(f"{args.target} {task.key}: does not compile: {outcome}", flush=True)
        elif outcome.code is not None:
            codes.append((task.key.replace(f" {task.config} ", " "), task.config, outcome.code.digest))
    for pair in (same := same_code(sorted(codes))):
        print(f"the same code twice: {pair}", file=sys.stderr)
    print(f"{args.target}: {len(tasks)} candidates, {len(codes)} compiled, {len(same)} of the code of another")
    return 1 if same else 0


def _check_kernel(kernel: str | None, known: tuple[str, ...]) -> None:
    if kernel is not None and kernel not in known:
        raise InputError(f"--kernel is {kernel!r}; it must be one of {', '.join(known)}")


def _check_positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"--{name} is {count}; it must be positive")


def _gate(args: argparse.Namespace) -> int:
    """1 where the machine code of large batches is not as it must be."""
    from ..configs.config import GEMM_KERNELS
    from ..configs.limits import device_for
    from ..configs.products import product_named
    from ..tuning.compile_pool import compiled
    from ..tuning.gates import activation_tasks, large_tasks, machine_faults
    from ..tuning.models import MODELS, model_named

    _check_kernel(args.kernel, GEMM_KERNELS)
    _check_positive(jobs=args.jobs)
    product = product_named(args.device)
    models = [model_named(name) for name in args.model] or MODELS
    tasks = large_tasks(models, product, (0, 2)) + activation_tasks(product)
    tasks = [task for task in tasks if args.kernel in (None, task.kernel)]
    faults, found = 0, []
    for task, outcome in compiled(tasks, args.jobs, lambda: False):
        wrong = machine_faults(task, outcome, device_for(product))
        faults += len(wrong)
        print(f"{product.name} {task.key}: {'; '.join(wrong) or 'as it must be'}", flush=True)
        found.append({"task": task.key, "faults": wrong, **_figures(outcome)})
    print(f"{product.name}: {len(tasks)} launches compiled, {faults} faults")
    if args.json:
        print(json.dumps(found))
    return 1 if faults else 0


def _figures(outcome: "Outcome") -> dict[str, Any]:
    return {} if isinstance(outcome, str) else dataclasses.asdict(outcome)
