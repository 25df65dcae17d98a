"""What commands read and how they name it: load tables and traces, model shapes, and errors that name the flags."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..planner import DEVICES, MODELS, ModelShape, RoutingTrace, check_loads, count_loads, find_model, model_of_routing
from ..planner.errors import FormatError, InputError
from ..planner.files import load_npz, npz_keys
from ..planner.options import EFFORTS, TRANSPORTS
from ..planner.pricing.devices import DEFAULT_DEVICE
from ..planner.pricing.models import SEQUENCE_LENGTH

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
SHAPE_HELP = f"{', '.join(MODELS)}, a config.json, or H,I,E,K"


@dataclass(frozen=True)
class Input:
    """A batch from a file, and what its file says about the model that was routed.

    loads: [L, M, E] or [L, M, R, E]. top_k: None where only loads are known. sequence_length: mean of a trace's.
    """

    path: Path
    loads: np.ndarray
    top_k: int | None
    sequence_length: int

    def shape(self, given: str | None) -> ModelShape:
        """The model that is priced: the one that `--shape` names, which must be of this routing, or the likeliest."""
        layers, experts = self.loads.shape[0], self.loads.shape[-1]
        if given is None:
            return model_of_routing(layers, experts, self.top_k)
        shape = find_model(given)
        if self.top_k is not None and (experts, self.top_k) != (shape.experts, shape.top_k):
            raise InputError(
                f"{self.path}: the trace chooses {self.top_k} of {experts} experts, but {shape.name} chooses "
                f"{shape.top_k} of {shape.experts}"
            )
        return shape


def add_goal_arguments(parser: argparse.ArgumentParser) -> None:
    """Nodes, GPU and memory, and what a plan is to achieve with them, as `PlanOptions` has it."""
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    parser.add_argument("--replica-slots", type=int, default=2, metavar="S", help="replica slots a rank; default 2")
    parser.add_argument(
        "--kept-bytes",
        type=float,
        metavar="BYTES",
        help="a rank's memory for kept replicas over all layers; default: a tenth of the GPU's",
    )
    parser.add_argument(
        "--balance", type=float, metavar="X", help="max/mean to reach at the least cost; default: the least time"
    )
    parser.add_argument("--effort", choices=EFFORTS, default="full", help="default full")
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="one", help="hops of tokens that are priced; default one"
    )
    parser.add_argument(
        "--device", default=DEFAULT_DEVICE, help=f"one of {', '.join(DEVICES)}; default {DEFAULT_DEVICE}"
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """How the sequences of a trace become micro-batches."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--micro-batch-sequences", type=int, metavar="B", help="for a trace: sequences a micro-batch, of all ranks"
    )
    size.add_argument(
        "--sequences-per-rank", type=int, metavar="B", help="the same, counted on one rank, as trainers do"
    )
    parser.add_argument("--num-experts", type=int, metavar="E", help="for a trace that does not say")


def check_output(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written. Raises: InputError."""
    if path is not None and (not path.parent.is_dir() or (path.exists() and not path.is_file())):
        raise InputError(f"{flag} is {path}, but must be a file in a directory that exists")


@contextmanager
def naming_flags(**others: str) -> Iterator[None]:
    """Within, errors about the library's arguments name the command's flags; `others` maps names that differ."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for name, flag in (_FLAGS | others).items():
            text = re.sub(rf"(?<![-\w]){name} is", f"{flag} is", text)
        raise type(error)(text) from None


def read_input(path: Path, args: argparse.Namespace, ranks: int | None) -> Input:
    """The load table in a file, or that of the trace in it; ranks: for `--sequences-per-rank`.

    Raises: InputError or FormatError that name the file.
    """
    size, flag = args.micro_batch_sequences, "--micro-batch-sequences"
    if args.sequences_per_rank is not None:
        size, flag = args.sequences_per_rank, "--sequences-per-rank"
    keys = npz_keys(path)
    if "loads" in keys:
        if size is not None:
            raise InputError(f"{flag} is for a trace, but {path} holds load tables")
        try:
            loads = check_loads(load_npz(path, ("loads",))["loads"])
            if args.num_experts not in (None, loads.shape[-1]):
                raise InputError(f"--num-experts is {args.num_experts}, but the loads are for {loads.shape[-1]}")
        except InputError as error:
            raise type(error)(f"{path}: {error}") from None
        return Input(path, loads, None, SEQUENCE_LENGTH)
    if "expert_ids" not in keys:
        raise FormatError(f"{path}: holds neither 'loads' nor 'expert_ids', only {sorted(keys)}")
    if size is None:
        raise InputError(f"--micro-batch-sequences or --sequences-per-rank is missing: {path} is a trace")
    if size < 1:
        raise InputError(f"{flag} is {size}, but must be at least 1")
    trace = RoutingTrace.load(path, args.num_experts)
    if trace.num_sequences == 0:
        raise FormatError(f"{path}: holds no sequences")
    if args.sequences_per_rank is not None:
        if ranks is None:
            raise InputError(
                f"--ep is {args.ep}, but --sequences-per-rank needs one number of ranks: give one (--ep "
                f"{args.ep.split(',')[0]}), or --micro-batch-sequences, which counts those of all ranks"
            )
        size *= ranks
    loads = count_loads(trace, np.arange(trace.num_sequences) // min(size, trace.num_sequences))
    return Input(path, loads, trace.top_k, max(1, round(trace.num_tokens / trace.num_sequences)))
