"""`relibra plan`: plan a batch from load tables or a recorded trace."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from ..planner import DEVICES, BatchPlan, ClusterSpec, PlanOptions, find_device, plan_batch
from ..planner.errors import InputError
from ..planner.files import save_npz
from ..planner.options import EFFORTS, TRANSPORTS
from ..planner.pricing.devices import DEFAULT_DEVICE
from .inputs import SHAPE_HELP, add_trace_arguments, naming_flags, read_input
from .plan_report import lines_of, report_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT.npz", type=Path, help="`loads`, or a recorded trace")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    parser.add_argument("--replica-slots", type=int, default=2, metavar="S", help="replica slots a rank; default 2")
    parser.add_argument(
        "--kept-bytes",
        type=float,
        metavar="BYTES",
        help="a rank's memory for kept replicas over all layers; default: a tenth of the GPU's",
    )
    parser.add_argument(
        "--fetched-slots", type=int, metavar="F", help="at most F of the S slots are fetched; default: all"
    )
    parser.add_argument(
        "--balance", type=float, metavar="X", help="max/mean to reach at the least cost; default: the least time"
    )
    parser.add_argument("--effort", choices=EFFORTS, default="full", help="default full")
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="one", help="hops of tokens that are priced; default one"
    )
    parser.add_argument("--previous", type=Path, metavar="PLAN.npz", help="plan of the batch before")
    parser.add_argument("--max-moves", type=int, metavar="N", help="experts of a layer that may change their home")
    add_trace_arguments(parser)
    parser.add_argument("--model", default="", help="name of the model, kept in the plan")
    parser.add_argument(
        "--shape",
        help=f"what is priced: {SHAPE_HELP}; default: the known model with as many layers, experts and top-k. "
        "Of a load table's model only H, I, K and attention are taken from it",
    )
    parser.add_argument(
        "--device", default=DEFAULT_DEVICE, help=f"one of {', '.join(DEVICES)}; default {DEFAULT_DEVICE}"
    )
    parser.add_argument("--save-loads", type=Path, metavar="LOADS.npz", help="also write the load table")
    parser.add_argument("--out", type=Path, metavar="PLAN.npz", help="default: the plan is not written")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    _check_paths(args)
    with naming_flags():
        cluster = ClusterSpec(args.nodes, args.gpus_per_node, args.replica_slots)
        device = find_device(args.device)
        PlanOptions(balance=args.balance, kept_bytes=args.kept_bytes, max_moves=args.max_moves)  # before any reading
        batch = read_input(args.input, args, cluster.num_ranks)
        shape = batch.shape(args.shape)
        options = PlanOptions(
            balance=args.balance,
            effort=args.effort,
            kept_bytes=args.kept_bytes,
            fetched_slots=args.fetched_slots,
            max_moves=args.max_moves,
            transport=args.transport,
            shape=shape,
            device=device,
            sequence_length=batch.sequence_length,
        )
    loads = batch.loads
    previous = _previous_home(args, loads, cluster)
    start = time.perf_counter()
    plan = plan_batch(loads, cluster, previous_home=previous, model=args.model, options=options)
    seconds = time.perf_counter() - start
    if args.out is not None:
        plan.save(args.out)
    if args.save_loads is not None:
        save_npz(args.save_loads, loads=loads)
    report = report_of(plan, loads, options, previous) | {"plan_seconds": seconds, "shape": shape.name}
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks, planned in {seconds:.2f} s"
    )
    guessed = "" if args.shape else ", the likeliest for this routing (--shape names another)"
    print(f"priced as {shape.name} on {options.device.name}, {batch.sequence_length} tokens a sequence{guessed}")
    print("\n".join(lines_of(report, "not written: give --out" if args.out is None else f"written to {args.out}")))
    if args.json:
        print(json.dumps(report))
    return 0


def _check_paths(args: argparse.Namespace) -> None:
    """What is to be written is no input, and can be written."""
    for name in ("out", "save_loads"):
        path = getattr(args, name)
        if path is not None and (not path.parent.is_dir() or (path.exists() and not path.is_file())):
            raise InputError(f"--{name.replace('_', '-')} is {path}, but must be a file in a directory that exists")
        if path is not None and path.resolve() == args.input.resolve():
            raise InputError(f"--{name.replace('_', '-')} is {path}, which is the input")
    if args.save_loads is None:
        return
    if args.previous is not None and args.save_loads.resolve() == args.previous.resolve():
        raise InputError(f"--save-loads is {args.save_loads}, which is --previous: it would be overwritten")
    if args.out is not None and args.save_loads.resolve() == args.out.resolve():
        raise InputError(f"--save-loads and --out are both {args.out}, but must be two files")


def _previous_home(args: argparse.Namespace, loads: np.ndarray, cluster: ClusterSpec) -> np.ndarray | None:
    """[L, E] of `--previous`, which must be for these layers, experts and ranks."""
    if args.previous is None:
        return None
    before = BatchPlan.load(args.previous, model=args.model or None)
    sizes = (before.num_layers, before.num_experts, before.num_ranks)
    expected = (loads.shape[0], loads.shape[-1], cluster.num_ranks)
    if sizes != expected:
        raise InputError(
            f"--previous {args.previous} is for [layers, experts, ranks] {sizes}, but this batch has {expected}"
        )
    return before.home
