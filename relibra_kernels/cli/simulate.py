"""`relibra simulate`: the paper's comparison, modelled: models x EP sizes x policies, on any routing."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import __version__
from ..planner import MODELS, ClusterSpec, ModelShape, PlanOptions, Scenario, find_device, find_model, simulate
from ..planner.errors import InputError, PolicyError, ReLibraError, one_of
from ..planner.simulation.simulate import OURS, POLICIES, unable
from ..planner.simulation.workloads import WORKLOADS, workload
from ..progress import Progress
from .function_file import UserFunction, line_of, load_function, said
from .inputs import SHAPE_HELP, Input, add_goal_arguments, add_trace_arguments, check_output, naming_flags, read_input
from .report import write_report
from .simulation_table import Case, Rows, failure_record, lines_of, record_of

_MODELS = "Qwen3-30B-A3B,GLM-4.5-Air,Qwen3-235B-A22B"
_MAX_MEAN = 7.3  # Qwen3-30B-A3B on DAPO-Math
_SEQUENCE_LENGTH = 8192  # of generated routing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", nargs="?", type=Path, metavar="INPUT.npz", help="`loads` or a trace; default: generated"
    )
    parser.add_argument("--models", metavar="A,B", help=f"of {', '.join(MODELS)}; default: a trace's own, or {_MODELS}")
    parser.add_argument("--shape", action="append", default=[], help=f"{SHAPE_HELP}; may be repeated")
    parser.add_argument("--ep", default="16,32,64", metavar="R,R", help="ranks; default 16,32,64")
    add_goal_arguments(parser)
    parser.add_argument(
        "--policies",
        default=",".join(POLICIES),
        metavar="A,B",
        help=f"of {', '.join(POLICIES)}; balanced, the yardstick, always",
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="one of your own beside them: from loads [L, M, E] and a ClusterSpec to an Outcome; may be repeated",
    )
    parser.add_argument(
        "--batches", type=int, default=1, metavar="N", help="in a row, each from the homes of the one before; default 1"
    )
    parser.add_argument(
        "--workload", choices=WORKLOADS, default="drift", help="generated routing; default drift, see docs/simulator.md"
    )
    parser.add_argument("--micro-batches", type=int, default=32, metavar="M", help="of generated routing; default 32")
    parser.add_argument(
        "--layers", type=int, default=16, metavar="L", help="of generated routing, a sample; default 16"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch, a rank, generated; default 8192")
    parser.add_argument(
        "--max-mean",
        type=float,
        help=f"hottest over mean expert; default {_MAX_MEAN}, or half of E/K where that is less",
    )
    parser.add_argument(
        "--sequence-length", type=int, help=f"for attention; default: a trace's mean, or {_SEQUENCE_LENGTH}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of generated routing; default 0")
    add_trace_arguments(parser)
    parser.add_argument("--html", type=Path, metavar="REPORT.html", help="also write one self-contained page")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    own = _own_policies(args.policy)
    with naming_flags(policy="--policies"):
        chosen = args.policies.split(",")
        policies = [*(one_of("policy", name, POLICIES) for name in chosen), *own]
    ranks = _ranks(args)
    recorded = None
    if args.input is not None:
        recorded = read_input(args.input, args, ranks[0] if len(ranks) == 1 else None)
        if recorded.loads.shape[1] < args.batches:
            raise InputError(
                f"--batches is {args.batches}, but {args.input} has {recorded.loads.shape[1]} micro-batches"
            )
    work, skipped = _able(_scenarios(args, ranks, recorded), policies, own)
    for line in skipped:
        print(f"skipped: {line}")
    if not work:
        raise InputError("nothing is left to simulate: --ep and --models do not go together")

    cases = []
    with Progress("simulating", sum(len(names) for _, names, _ in work) * args.batches) as bar:
        for scenario, names, failed in work:
            home = None
            for batch, loads in enumerate(_batches(args, scenario, recorded)):
                rows, why = _results(loads, scenario, names, own, home, bar)
                home = rows[OURS].home if OURS in rows else None
                cases.append(Case(scenario, batch, args.batches, rows, failed | why))
    length = cases[0].scenario.options.sequence_length
    print(f"Modelled, not measured: {args.device}, sequences of {length} tokens, see docs/simulator.md.")
    for case in cases:
        layers, micro_batches = next(iter(case.rows.values())).rank_load.shape[:2]
        print(f"\n{case.title}: {layers} layers x {micro_batches} micro-batches")
        print("\n".join(lines_of(case)))
    if args.html is not None:
        write_report(args.html, cases, _inputs(args, cases))
        print(f"\nreport written to {args.html}")
    if args.json:
        records = [record_of(case, result) for case in cases for result in case.rows.values()]
        print(json.dumps([*records, *(failure_record(case, name) for case in cases for name in case.failed)]))
    failures = sorted({name for case in cases for name in case.failed})
    if failures:
        print(f"relibra simulate: failed: {', '.join(failures)}; the other policies are shown", file=sys.stderr)
    return 1 if failures else 0


def _own_policies(texts: list[str]) -> dict[str, UserFunction]:
    own: dict[str, UserFunction] = {}
    for text in texts:
        function = load_function("--policy", text)
        if function.name in own or function.name in POLICIES:
            raise InputError(f"--policy is {text!r}, but there is a policy of that name already: rename the function")
        own[function.name] = function
    return own


def _results(
    loads: np.ndarray,
    scenario: Scenario,
    names: list[str],
    own: dict[str, UserFunction],
    home: np.ndarray | None,
    bar: Progress,
) -> tuple[Rows, dict[str, str]]:
    """Every policy's result, and why there is none of the user's own that failed: they must not stop the others."""
    rows: Rows = {}
    failed = {}
    for name in names:
        others = {name: own[name].call} if name in own else {}
        try:
            rows |= simulate(loads, scenario, [name], previous_home=home, others=others)
        except ReLibraError as error:
            if name not in own:
                raise
            failed[name] = _failure(error, own[name])
        bar.step()
    return rows, failed


def _failure(error: ReLibraError, function: UserFunction) -> str:
    """The words of a failed policy, with the line of its file."""
    cause = error.__cause__ if isinstance(error, PolicyError) else None
    return str(error) + line_of(error, function.path) if cause is None else said(cause) + line_of(cause, function.path)


def _check_numbers(args: argparse.Namespace) -> None:
    check_output("--html", args.html)
    for name in ("micro_batches", "tokens", "sequence_length", "gpus_per_node", "layers", "batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, but must not be negative")


def _ranks(args: argparse.Namespace) -> list[int]:
    for text in args.ep.split(","):
        if not text.isdigit() or int(text) < 1 or int(text) % args.gpus_per_node:
            raise InputError(f"--ep names {text!r}, but must be multiples of --gpus-per-node {args.gpus_per_node}")
    return [int(text) for text in args.ep.split(",")]


def _shapes(args: argparse.Namespace, recorded: Input | None) -> list[ModelShape]:
    """The models that are named; those of a recorded batch must choose as it does."""
    names = [*(args.models.split(",") if args.models else []), *args.shape]
    with naming_flags(model="--models" if args.models else "--shape"):
        if recorded is not None:
            return [recorded.shape(name) for name in names or [None]]
        return [find_model(name) for name in names or _MODELS.split(",")]


def _scenarios(args: argparse.Namespace, ranks: list[int], recorded: Input | None) -> list[Scenario]:
    found = []
    length = args.sequence_length or (recorded.sequence_length if recorded else _SEQUENCE_LENGTH)
    for shape in _shapes(args, recorded):
        for count in ranks:
            with naming_flags():
                cluster = ClusterSpec(count // args.gpus_per_node, args.gpus_per_node, args.replica_slots)
                options = PlanOptions(
                    balance=args.balance,
                    effort=args.effort,
                    kept_bytes=args.kept_bytes,
                    transport=args.transport,
                    shape=shape,
                    device=find_device(args.device),
                    sequence_length=length,
                )
            found.append(Scenario(cluster, options))
    return found


def _able(
    scenarios: list[Scenario], policies: list[str], own: dict[str, UserFunction]
) -> tuple[list[tuple[Scenario, list[str], dict[str, str]]], list[str]]:
    """Scenarios with the policies that can serve them and the user's that failed, and a line for what cannot be.

    Found before any of the work. Forced balance is the yardstick of every scenario, also where it is not asked for.
    """
    work, lines = [], []
    others = {name: function.call for name, function in own.items()}
    for scenario in scenarios:
        experts, title = scenario.options.shape.experts, Case(scenario, 0, 1, {}).title
        why, failed = {}, {}
        for name in policies:
            try:
                why[name] = unable(name, experts, scenario.cluster, others)
            except ReLibraError as error:
                if name not in own:
                    raise
                failed[name] = _failure(error, own[name])
        if not failed and all(why.values()):
            lines.append(f"{title}: {next(iter(why.values()))}")
            continue
        by_reason: dict[str, list[str]] = {"": []}
        for name, reason in why.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"{title}, {', '.join(names)}: {reason}" for reason, names in by_reason.items() if reason]
        able = by_reason[""]
        work.append((scenario, able if "balanced" in able else [*able, "balanced"], failed))
    return work, lines


def _batches(args: argparse.Namespace, scenario: Scenario, recorded: Input | None) -> Iterator[np.ndarray]:
    """Load tables, one a batch: of recorded routing its micro-batches in order, of generated one the drift goes on."""
    if recorded is not None:
        loads = recorded.loads
    else:
        shape = scenario.options.shape
        sizes = min(shape.layers, args.layers), args.micro_batches * args.batches, shape.experts, shape.top_k
        tokens = args.tokens * scenario.cluster.num_ranks
        loads = workload(args.workload, *sizes, tokens, max_mean=_max_mean(args, shape), seed=args.seed)
    yield from np.array_split(loads, args.batches, axis=1)


def _max_mean(args: argparse.Namespace, shape: ModelShape) -> float:
    return min(_MAX_MEAN, max(1.0, shape.experts / shape.top_k / 2)) if args.max_mean is None else args.max_mean


def _inputs(args: argparse.Namespace, cases: list[Case]) -> dict[str, str]:
    """What was simulated, for a reader who has only the page."""
    options = cases[0].scenario.options
    routing = f"recorded: {args.input}" if args.input is not None else (
        f"generated: {args.workload}, seed {args.seed}, {args.tokens} tokens a micro-batch and rank, hottest over mean "
        f"expert {_max_mean(args, options.shape):g}; {args.layers} layers at most, {args.micro_batches} micro-batches"
    )  # fmt: skip
    shapes = {case.scenario.options.shape.name: case.scenario.options.shape for case in cases}
    return {
        "command": shlex.join(["relibra", *(sys.argv[1:] if sys.argv[1:2] == ["simulate"] else ["simulate"])]),
        "version": f"relibra-kernels {__version__}",
        "routing": routing,
        "batches": f"{args.batches}{', each from the homes of the one before' if args.batches > 1 else ''}",
        "models": "; ".join(
            f"{s.name}: {s.top_k} of {s.experts} experts, hidden {s.hidden_size}, intermediate {s.intermediate_size}"
            for s in shapes.values()
        ),
        "machine": f"{options.device.name}, {args.gpus_per_node} GPUs a node, {args.replica_slots} replica slots",
        "sequence length": f"{options.sequence_length} tokens",
        "memory for kept replicas": f"{options.kept_copies * options.shape.copy_bytes / 1e9:.2f} GB a rank",
        "goal of our plan": "the least time" if args.balance is None else f"max/mean {args.balance:g}",
    }
