"""`relibra plan`: plan a batch from load tables or a recorded trace."""

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..planner import (
    DEVICES,
    MODELS,
    BatchPlan,
    ClusterSpec,
    PlanOptions,
    RoutingTrace,
    check_loads,
    count_loads,
    find_device,
    find_model,
    outcome_of_plan,
    plan_batch,
    replica_bytes,
)
from ..planner.errors import FormatError, InputError
from ..planner.files import load_npz, npz_keys, save_npz
from ..planner.options import EFFORTS, TRANSPORTS
from ..planner.pricing.devices import DEFAULT_DEVICE
from ..planner.pricing.models import DEFAULT_MODEL

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
        help="a rank's memory for kept replicas over all layers; default: a tenth",
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
        "--shape", default=DEFAULT_MODEL, help=f"what is priced: {', '.join(MODELS)}, a config.json, or H,I,E,K"
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
            shape=find_model(args.shape),
            device=find_device(args.device),
        )
    shape = options.shape
    loads = read_loads(args.input, args.micro_batch_sequences, args.num_experts)
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
    outcome = outcome_of_plan(plan, loads, previous)
    fast, slow = replica_bytes(outcome, shape)
    report: dict[str, Any] = {
        "imbalance_mean": plan.imbalance_mean(loads),
        "imbalance_worst": plan.imbalance_worst(loads),
        "plan_seconds": seconds,
        "replicas_mean": float(outcome.pushed_in.sum(2).mean()),
        "kept_mean": float(plan.kept.sum((1, 2)).mean()),
        "moves_mean": float(outcome.moved_in.sum(1).mean()),
        "bytes_fast": fast,
        "bytes_slow": slow,
        "kept_bytes_worst": int(plan.kept.sum((0, 2)).max() * shape.copy_bytes),
        "shape": shape.name,
    }
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks, planned in {seconds:.2f} s"
    )
    print(f"max/mean over ranks: mean {report['imbalance_mean']:.4f}, worst {report['imbalance_worst']:.4f}")
    print(
        f"per layer and micro-batch: {report['replicas_mean']:.1f} replicas, {fast / 1e6:.1f} MB inside nodes, ", end=""
    )
    print(f"{slow / 1e6:.1f} MB between them (experts of {shape.name})")
    print(f"per layer: {report['kept_mean']:.1f} kept replicas, {report['moves_mean']:.1f} experts moved; ", end="")
    print(f"kept replicas take up to {report['kept_bytes_worst'] / 1e9:.2f} GB of a rank")
    print(f"plan written to {args.out}")
    if args.json:
        print(json.dumps(report))
    return 0


@contextmanager
def naming_flags() -> Iterator[None]:
    """Errors about the library's arguments name the flags that gave them."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for name, flag in _FLAGS.items():
            text = re.sub(rf"\b{name}\b", flag, text)
        raise type(error)(text) from None


def read_loads(path: Path, micro_batch_sequences: int | None, num_experts: int | None) -> np.ndarray:
    """The load table in a file, or that of the trace in it."""
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
    return count_loads(trace, np.arange(trace.num_sequences) // min(micro_batch_sequences, trace.num_sequences))
