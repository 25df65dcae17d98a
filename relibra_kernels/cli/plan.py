"""`relibra plan`: plan a batch from load tables or a recorded trace."""

import argparse
import json
import time
from pathlib import Path

from ..planner import plan_batch
from ..planner.errors import InputError
from ..planner.files import save_npz
from .inputs import check_output
from .plan_report import lines_of, report_of
from .plan_request import add_plan_arguments, read_plan_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--save-loads", type=Path, metavar="LOADS.npz", help="also write the load table")
    parser.add_argument("--out", type=Path, metavar="PLAN.npz", help="default: the plan is not written")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    _check_paths(args)
    request = read_plan_request(args)
    loads, options, previous = request.batch.loads, request.options, request.previous_home
    start = time.perf_counter()
    plan = plan_batch(loads, request.cluster, previous_home=previous, model=args.model, options=options)
    seconds = time.perf_counter() - start
    if args.out is not None:
        plan.save(args.out)
    if args.save_loads is not None:
        save_npz(args.save_loads, loads=loads)
    report = report_of(plan, loads, options, previous) | {"plan_seconds": seconds, "shape": options.shape.name}
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks, planned in {seconds:.2f} s"
    )
    guessed = "" if args.shape else ", the likeliest for this routing (--shape names another)"
    print(
        f"priced as {options.shape.name} on {options.device.name}, {options.sequence_length} tokens a sequence{guessed}"
    )
    print("\n".join(lines_of(report, "not written: give --out" if args.out is None else f"written to {args.out}")))
    if args.json:
        print(json.dumps(report))
    return 0


def _check_paths(args: argparse.Namespace) -> None:
    """What is to be written is no input, and can be written."""
    for name in ("out", "save_loads"):
        flag, path = f"--{name.replace('_', '-')}", getattr(args, name)
        check_output(flag, path)
        if path is not None and path.resolve() == args.input.resolve():
            raise InputError(f"{flag} is {path}, which is the input")
    if args.save_loads is None:
        return
    if args.previous is not None and args.save_loads.resolve() == args.previous.resolve():
        raise InputError(f"--save-loads is {args.save_loads}, which is --previous: it would be overwritten")
    if args.out is not None and args.save_loads.resolve() == args.out.resolve():
        raise InputError(f"--save-loads and --out are both {args.out}, but must be two files")
