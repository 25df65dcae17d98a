"""What `relibra plan` and `relibra estimate` plan: the arguments that say so, and what they read."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..planner import BatchPlan, ClusterSpec, PlanOptions, find_device
from ..planner.errors import InputError
from .inputs import SHAPE_HELP, Input, add_goal_arguments, add_trace_arguments, naming_flags, read_input


class PlanRequest(NamedTuple):
    """`previous_home` is [L, E], None where no plan of the batch before was given."""

    batch: Input
    cluster: ClusterSpec
    options: PlanOptions
    previous_home: np.ndarray | None


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is planned, for which machine and model, and what the plan is to achieve."""
    parser.add_argument("input", metavar="INPUT.npz", type=Path, help="`loads`, or a recorded trace")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    add_goal_arguments(parser)
    parser.add_argument(
        "--fetched-slots", type=int, metavar="F", help="at most F of the S slots are fetched; default: all"
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
        "--adapter-rank", type=int, default=0, metavar="R", help="experts are frozen, with adapters of rank R beside"
    )


def read_plan_request(args: argparse.Namespace) -> PlanRequest:
    """What the arguments of `add_plan_arguments` say, and the files that they name."""
    with naming_flags():
        cluster = ClusterSpec(args.nodes, args.gpus_per_node, args.replica_slots)
        options = PlanOptions(
            balance=args.balance,
            effort=args.effort,
            kept_bytes=args.kept_bytes,
            fetched_slots=args.fetched_slots,
            max_moves=args.max_moves,
            transport=args.transport,
            device=find_device(args.device),
        )
        if args.adapter_rank < 0:
            raise InputError(f"--adapter-rank is {args.adapter_rank}; it must not be negative")
        batch = read_input(args.input, args, cluster.num_ranks)
        shape = replace(batch.shape(args.shape), adapter_rank=args.adapter_rank)
        options = replace(options, shape=shape, sequence_length=batch.sequence_length)
    return PlanRequest(batch, cluster, options, _previous_home(args, batch.loads, cluster))


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
