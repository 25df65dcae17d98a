"""`relibra plan`: plan a batch from load tables or a recorded trace."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from ..planner import BatchPlan, ClusterSpec, RoutingTrace, check_loads, count_loads, plan_batch
from ..planner.errors import FormatError, InputError
from ..planner.files import load_npz, npz_keys, save_npz


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT.npz", type=Path, help="`loads`, or a recorded trace")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    parser.add_argument("--replica-slots", type=int, required=True, metavar="S", help="replica slots a rank")
    parser.add_argument("--guest-slots", type=int, metavar="A", help="of them for other nodes' experts, at most")
    parser.add_argument("--previous", type=Path, metavar="PLAN.npz", help="plan of the batch before")
    parser.add_argument("--micro-batch-sequences", type=int, metavar="B", help="for a trace: sequences a micro-batch")
    parser.add_argument("--num-experts", type=int, metavar="E", help="for a trace that does not say")
    parser.add_argument("--model", default="", help="name of the model, kept in the plan")
    parser.add_argument("--save-loads", type=Path, metavar="LOADS.npz", help="also write the load table")
    parser.add_argument("--out", type=Path, required=True, metavar="PLAN.npz")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    for name in ("out", "save_loads"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise InputError(f"--{name.replace('_', '-')} is {path}, but {path.parent} is not a directory")
    cluster = ClusterSpec(args.nodes, args.gpus_per_node, args.replica_slots, args.guest_slots)
    loads = _read_loads(args)
    previous = None if args.previous is None else BatchPlan.load(args.previous, model=args.model).home

    start = time.perf_counter()
    plan = plan_batch(loads, cluster, previous_home=previous, model=args.model)
    seconds = time.perf_counter() - start

    if args.save_loads is not None:
        save_npz(args.save_loads, loads=loads)
    plan.save(args.out)
    report = {
        "imbalance_mean": plan.imbalance_mean(loads),
        "imbalance_worst": plan.imbalance_worst(loads),
        "plan_seconds": seconds,
        "replicas_mean": float((plan.replicas >= 0).sum() / (plan.num_layers * plan.num_micro_batches)),
    }
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks, planned in {seconds:.2f} s"
    )
    print(f"max/mean over ranks: mean {report['imbalance_mean']:.4f}, worst {report['imbalance_worst']:.4f}")
    print(f"replicas per layer and micro-batch: {report['replicas_mean']:.1f}")
    print(f"plan written to {args.out}")
    if args.json:
        print(json.dumps(report))
    return 0


def _read_loads(args: argparse.Namespace) -> np.ndarray:
    keys = npz_keys(args.input)
    if "loads" in keys:
        if args.micro_batch_sequences is not None:
            raise InputError(f"--micro-batch-sequences is for a trace, but {args.input} holds load tables")
        try:
            return check_loads(load_npz(args.input, ("loads",))["loads"])
        except InputError as error:
            raise type(error)(f"{args.input}: {error}") from None
    if "expert_ids" not in keys:
        raise FormatError(f"{args.input}: holds neither 'loads' nor 'expert_ids', only {sorted(keys)}")
    if args.micro_batch_sequences is None or args.micro_batch_sequences < 1:
        raise InputError(
            f"--micro-batch-sequences is {args.micro_batch_sequences}, but a trace ({args.input}) needs at least 1"
        )
    trace = RoutingTrace.load(args.input, args.num_experts)
    return count_loads(trace, np.arange(trace.num_sequences) // args.micro_batch_sequences)
