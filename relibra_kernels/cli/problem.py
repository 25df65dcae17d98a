"""What `relibra plan` and `relibra estimate` plan: the arguments that say so, and the loads that they read."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..planner import (
    DEVICES,
    MODELS,
    BatchPlan,
    ClusterSpec,
    ModelShape,
    PlanOptions,
    RoutingTrace,
    check_loads,
    count_loads,
    find_device,
    find_model,
)
from ..planner.errors import FormatError, InputError
from ..planner.files import load_npz, npz_keys
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


class Problem(NamedTuple):
    """`loads` [L, M, E] or [L, M, R, E]; `previous_home` [L, E], None where no plan of the batch before was given."""

    loads: np.ndarray
    cluster: ClusterSpec
    options: PlanOptions
    previous_home: np.ndarray | None


def add_problem(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is planned, for which machine and model, and what the plan is to achieve."""
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


def read_problem(args: argparse.Namespace) -> Problem:
    """What the arguments of `add_problem` say, and the files that they name."""
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
    return Problem(loads, cluster, options, previous)


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
