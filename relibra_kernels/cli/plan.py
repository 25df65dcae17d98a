"""`relibra plan`: plan a batch from load tables or a recorded trace."""

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..planner import (
    DEVICES,
    MODELS,
    BatchPlan,
    ClusterSpec,
    ModelShape,
    PlanOptions,
    RoutingTrace,
    Setting,
    check_loads,
    count_loads,
    find_device,
    find_model,
    outcome_of_plan,
    plan_batch,
    price,
)
from ..planner.errors import FormatError, InputError
from ..planner.files import load_npz, npz_keys, save_npz
from ..planner.loads import total_loads
from ..planner.options import EFFORTS, TRANSPORTS
from ..planner.plan import contiguous_home
from ..planner.pricing.devices import DEFAULT_DEVICE
from ..planner.pricing.models import DEFAULT_MODEL
from ..planner.simulation.baselines.balanced import forced_balanced

_FLAGS = {
    "num_nodes": "--nodes",
    "gpus_per_node": "--gpus-per-node",
    "replica_slots": "--replica-slots",
    "kept_bytes": "--kept-bytes",
    "fetched_slots": "--fetched-slots",
    "balance": "--balance",
    "max_moves": "--max-moves",
    "model": "--shape",
    "shape": "--shape",
    "device": "--device",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT.npz", type=Path, help="`loads`, or a recorded trace")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    parser.add_argument("--replica-slots", type=int, required=True, metavar="S", help="replica slots a rank")
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
    parser.add_argument("--micro-batch-sequences", type=int, metavar="B", help="for a trace: sequences a micro-batch")
    parser.add_argument("--num-experts", type=int, metavar="E", help="for a trace that does not say")
    parser.add_argument("--model", default="", help="name of the model, kept in the plan")
    parser.add_argument(
        "--shape",
        help=f"what is priced: {', '.join(MODELS)}, a config.json, or H,I,E,K; "
        f"default {DEFAULT_MODEL}. Of a load table's model only H, I, K and attention are taken from it",
    )
    parser.add_argument(
        "--device", default=DEFAULT_DEVICE, help=f"one of {', '.join(DEVICES)}; default {DEFAULT_DEVICE}"
    )
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
    with naming_flags():
        cluster = ClusterSpec(args.nodes, args.gpus_per_node, args.replica_slots)
        options = PlanOptions(
            balance=args.balance,
            effort=args.effort,
            kept_bytes=args.kept_bytes,
            fetched_slots=args.fetched_slots,
            max_moves=args.max_moves,
            transport=args.transport,
            shape=find_model(args.shape or DEFAULT_MODEL),
            device=find_device(args.device),
        )
    shape = options.shape
    loads = read_loads(args.input, args.micro_batch_sequences, args.num_experts, shape if args.shape else None)
    previous = None
    if args.previous is not None:
        before = BatchPlan.load(args.previous, model=args.model or None)
        sizes = (before.num_layers, before.num_experts, before.num_ranks)
        expected = (loads.shape[0], loads.shape[-1], cluster.num_ranks)
        if sizes != expected:
            raise InputError(
                f"--previous {args.previous} is for [layers, experts, ranks] {sizes}, but this batch has {expected}"
            )
        previous = before.home

    start = time.perf_counter()
    plan = plan_batch(loads, cluster, previous_home=previous, model=args.model, options=options)
    seconds = time.perf_counter() - start

    plan.save(args.out)
    if args.save_loads is not None:
        save_npz(args.save_loads, loads=loads)
    report = report_of(plan, loads, options, previous) | {"plan_seconds": seconds, "shape": shape.name}
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks, planned in {seconds:.2f} s"
    )
    print(f"max/mean over ranks: mean {report['imbalance_mean']:.4f}, worst {report['imbalance_worst']:.4f}")
    print(
        f"modelled step ({shape.name}, {options.device.name}): {report['modelled_over_balanced']:.4f} of forced "
        f"balanced routing; {report['local_share']:.1%} of the assignments stay on their node"
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
    setting = Setting(
        replace(options.shape, experts=plan.num_experts),
        options.device,
        plan.gpus_per_node,
        options.sequence_length,
        options.transport,
    )
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


@contextmanager
def naming_flags(**others: str) -> Iterator[None]:
    """Errors about the library's arguments name the flags that gave them; `others` says which, where it is another."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for name, flag in (_FLAGS | others).items():
            text = re.sub(rf"(?<![-\w]){name} is", f"{flag} is", text)
        raise type(error)(text) from None


def read_loads(
    path: Path, micro_batch_sequences: int | None, num_experts: int | None, shape: ModelShape | None = None
) -> np.ndarray:
    """The load table in a file, or that of the trace in it. A trace must be of `shape`, where that is given."""
    keys = npz_keys(path)
    if "loads" in keys:
        if micro_batch_sequences is not None:
            raise InputError(f"--micro-batch-sequences is for a trace, but {path} holds load tables")
        try:
            loads = check_loads(load_npz(path, ("loads",))["loads"])
            if num_experts is not None and num_experts != loads.shape[-1]:
                raise InputError(f"--num-experts is {num_experts}, but the loads are for {loads.shape[-1]}")
            return loads
        except InputError as error:
            raise type(error)(f"{path}: {error}") from None
    if "expert_ids" not in keys:
        raise FormatError(f"{path}: holds neither 'loads' nor 'expert_ids', only {sorted(keys)}")
    if micro_batch_sequences is None:
        raise InputError(f"--micro-batch-sequences is missing: {path} is a trace")
    if micro_batch_sequences < 1:
        raise InputError(f"--micro-batch-sequences is {micro_batch_sequences}, but must be at least 1")
    trace = RoutingTrace.load(path, num_experts)
    if trace.num_sequences == 0:
        raise FormatError(f"{path}: holds no sequences")
    if shape is not None and (trace.num_experts, trace.top_k) != (shape.experts, shape.top_k):
        raise InputError(
            f"{path}: the trace chooses {trace.top_k} of {trace.num_experts} experts, but {shape.name} chooses "
            f"{shape.top_k} of {shape.experts}"
        )
    return count_loads(trace, np.arange(trace.num_sequences) // min(micro_batch_sequences, trace.num_sequences))
