"""`relibra plan`: plan a batch from load tables or a recorded trace."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..planner import BatchPlan, ClusterSpec, PlanOptions, outcome_of_plan, plan_batch, price
from ..planner.errors import InputError
from ..planner.files import save_npz
from ..planner.loads import total_loads
from ..planner.plan import contiguous_home
from ..planner.pricing.balanced import forced_balanced
from .problem import add_problem, read_problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    parser.add_argument("--save-loads", type=Path, metavar="LOADS.npz", help="also write the load table")
    parser.add_argument("--out", type=Path, required=True, metavar="PLAN.npz")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    for name in ("out", "save_loads"):
        path = getattr(args, name)
        if path is not None and (not path.parent.is_dir() or (path.exists() and not path.is_file())):
            raise InputError(f"--{name.replace('_', '-')} is {path}, but must be a file in a directory that exists")
        if path is not None and path.resolve() == args.input.resolve():
            raise InputError(f"--{name.replace('_', '-')} is {path}, which is the input")
    if None not in (args.save_loads, args.previous) and args.save_loads.resolve() == args.previous.resolve():
        raise InputError(f"--save-loads is {args.save_loads}, which is --previous: it would be overwritten")
    if args.save_loads is not None and args.save_loads.resolve() == args.out.resolve():
        raise InputError(f"--save-loads and --out are both {args.out}, but must be two files")
    loads, cluster, options, previous = read_problem(args)

    start = time.perf_counter()
    plan = plan_batch(loads, cluster, previous_home=previous, model=args.model, options=options)
    seconds = time.perf_counter() - start

    plan.save(args.out)
    if args.save_loads is not None:
        save_npz(args.save_loads, loads=loads)
    report = report_of(plan, loads, options, previous) | {"plan_seconds": seconds, "shape": options.shape.name}
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks, planned in {seconds:.2f} s"
    )
    print(f"max/mean over ranks: mean {report['imbalance_mean']:.4f}, worst {report['imbalance_worst']:.4f}")
    print(
        f"modelled step ({options.shape.name}, {options.device.name}): {report['modelled_over_balanced']:.4f} of "
        f"forced balanced routing; {report['local_share']:.1%} of the assignments stay on their node"
    )
    print(
        f"per layer: {report['kept_mean']:.1f} kept replicas, up to {report['kept_bytes_worst'] / 1e9:.2f} GB "
        f"of a rank; {report['moves_mean']:.1f} experts moved"
    )
    print(
        f"per layer and micro-batch: {report['replicas_mean']:.1f} fetched replicas, at most "
        f"{report['busiest_sender_mean']:.1f} from one rank"
    )
    print(f"plan written to {args.out}")
    if args.json:
        print(json.dumps(report))
    return 0


def report_of(plan: BatchPlan, loads: np.ndarray, options: PlanOptions, previous: np.ndarray | None) -> dict[str, Any]:
    """The figures of a plan. Moves are counted from `previous`, or from contiguous homes."""
    before = contiguous_home(plan.num_layers, plan.num_experts, plan.num_ranks) if previous is None else previous
    outcome = outcome_of_plan(plan, loads, before)
    setting = options.setting(plan.num_experts, plan.gpus_per_node)
    cluster = ClusterSpec(plan.num_ranks // plan.gpus_per_node, plan.gpus_per_node, plan.num_slots)
    cost, bound = price(outcome, setting), price(forced_balanced(total_loads(loads), cluster), setting)
    return {
        "imbalance_mean": plan.imbalance_mean(loads),
        "imbalance_worst": plan.imbalance_worst(loads),
        "modelled_over_balanced": cost.seconds / bound.seconds if bound.seconds else 1.0,
        "replicas_mean": float(outcome.pushed_in.sum(2).mean()),
        "busiest_sender_mean": float(outcome.pushed_out.max(2).mean()),
        "kept_mean": float(plan.kept.sum((1, 2)).mean()),
        "kept_bytes_worst": int(plan.kept.sum((0, 2)).max(initial=0) * options.shape.copy_bytes),
        "moves_mean": float(outcome.moved_in.sum(1).mean()),
        "migration_bytes": int(outcome.moved_in.sum() * options.shape.migration_bytes),
        "local_share": 1.0 if np.isnan(outcome.local_share) else outcome.local_share,
        "bytes_fast": cost.bytes_fast,
        "bytes_slow": cost.bytes_slow,
    }
