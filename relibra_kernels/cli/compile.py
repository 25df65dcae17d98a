"""`relibra compile`: every kernel and config for a GPU that need not be here."""

import argparse
import dataclasses
import json
import sys

from ..planner.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..configs.limits import DEVICES

    parser.add_argument("--target", required=True, help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--kernel", help="only this kernel")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of the tensors")
    parser.add_argument("--first", action="store_true", help="one config a kernel, the one chosen for large batches")
    parser.add_argument("--json", action="store_true", help="also print a list of objects as the last line")


def run(args: argparse.Namespace) -> int:
    """1 where a launch spills registers, does not fit the device or is known to be compiled wrongly."""
    import torch

    from ..configs.limits import device_named

    device = device_named(args.target)
    from ..tuning.compile_matrix import KERNELS, reports

    if args.kernel is not None and args.kernel not in KERNELS:
        raise InputError(f"--kernel is {args.kernel!r}; it must be one of {', '.join(KERNELS)}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    columns = ("registers", "spill", "shared", "stages", "warps/SM", "mma", "tma", "async")
    print(f"{'kernel':18} {'config':18} {'variant':28} " + " ".join(f"{column:>9}" for column in columns))
    found, bad = [], 0
    for name, config, variant, report in reports(device, dtype, args.kernel, first_only=args.first):
        facts = (report.registers, report.spill_bytes, report.shared_bytes, report.stages, report.warps_per_sm)
        loads = (str(report.mma or "-")[:9], report.tma, report.async_copies)
        print(f"{name:18} {config:18} {variant:28} " + " ".join(f"{fact:>9}" for fact in (*facts, *loads)), flush=True)
        found.append({"kernel": name, "config": config, "variant": variant, **dataclasses.asdict(report)})
        bad += report.spill_bytes > 0 or report.shared_bytes > device.shared_bytes or report.known_bug != ""
        if report.known_bug:
            print(report.known_bug, file=sys.stderr)
    if bad:
        print(
            f"{bad} of {len(found)} launches spill registers, exceed {device.shared_bytes} bytes or meet a bug",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(found))
    return 1 if bad else 0
