"""`relibra simulate`: the paper's comparison, modelled: models x EP sizes x policies, on any routing."""

import argparse
import json
from pathlib import Path

import numpy as np

from ..planner import (
    DEVICES,
    MODELS,
    ClusterSpec,
    PlanOptions,
    Result,
    Scenario,
    find_device,
    find_model,
    simulate,
)
from ..planner.errors import InputError
from ..planner.options import EFFORTS, TRANSPORTS
from ..planner.simulation.simulate import POLICIES
from ..planner.simulation.workloads import WORKLOADS, workload
from ..progress import Progress
from .problem import naming_flags, read_loads
from .simulation_report import write_report

_MODELS = "Qwen3-30B-A3B,GLM-4.5-Air,Qwen3-235B-A22B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", nargs="?", type=Path, metavar="INPUT.npz", help="`loads` or a trace; default: generated"
    )
    parser.add_argument("--models", default=_MODELS, metavar="A,B", help=f"of {', '.join(MODELS)}; default {_MODELS}")
    parser.add_argument("--ep", default="16,32,64", metavar="R,R", help="ranks; default 16,32,64")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G")
    parser.add_argument("--replica-slots", type=int, default=2, metavar="S")
    parser.add_argument("--device", default="8xH100", help=f"one of {', '.join(DEVICES)}; default 8xH100")
    parser.add_argument("--policies", default=",".join(POLICIES), metavar="A,B", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--balance", type=float, metavar="X", help="for our plan; default: the least time")
    parser.add_argument("--effort", choices=EFFORTS, default="full")
    parser.add_argument(
        "--kept-bytes",
        type=float,
        metavar="BYTES",
        help="a rank's memory for kept replicas; default: a tenth of the GPU's",
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="one", help="hops of tokens; default one")
    parser.add_argument(
        "--workload", choices=WORKLOADS, default="drift", help="generated routing; default drift, see docs/simulator.md"
    )
    parser.add_argument("--micro-batches", type=int, default=32, metavar="M", help="of generated routing; default 32")
    parser.add_argument(
        "--layers", type=int, default=16, metavar="L", help="of generated routing, a sample; default 16"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch, a rank, generated; default 8192")
    parser.add_argument("--max-mean", type=float, default=7.3, help="hottest over mean expert; default 7.3")
    parser.add_argument("--sequence-length", type=int, default=8192, help="for attention; default 8192")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch-sequences", type=int, metavar="B", help="for a trace: sequences a micro-batch")
    parser.add_argument("--num-experts", type=int, metavar="E", help="for a trace that does not say")
    parser.add_argument("--html", type=Path, metavar="REPORT.html", help="also write one self-contained page")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    if args.html is not None and (not args.html.parent.is_dir() or args.html.is_dir()):
        raise InputError(f"--html is {args.html}, but must be a file in a directory that exists")
    for name in ("micro_batches", "tokens", "sequence_length", "gpus_per_node", "layers"):
        value = getattr(args, name)
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, but must not be negative")
    scenarios = _scenarios(args)
    policies = args.policies.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise InputError(f"--policies names {policy!r}; known are {', '.join(POLICIES)}")
    recorded = None
    if args.input is not None:
        recorded = read_loads(args.input, args.micro_batch_sequences, args.num_experts)

    results: list[tuple[Scenario, dict[str, Result]]] = []
    with Progress("simulating", len(scenarios) * len(policies)) as bar:
        for scenario in scenarios:
            loads = recorded if recorded is not None else _generated(args, scenario)
            results.append((scenario, simulate(loads, scenario, policies, lambda _name: bar.step())))
    print(f"Modelled, not measured: {args.device}, sequences of {args.sequence_length} tokens, see docs/simulator.md.")
    for scenario, by_policy in results:
        layers, micro_batches = next(iter(by_policy.values())).rank_load.shape[:2]
        print(
            f"\n{scenario.options.shape.name}, EP {scenario.cluster.num_ranks}: {layers} layers x {micro_batches} "
            "micro-batches"
        )
        print("\n".join(table(by_policy)))
    if args.html is not None:
        write_report(args.html, results)
        print(f"\nreport written to {args.html}")
    if args.json:
        print(json.dumps([_row(scenario, result) for scenario, r in results for result in r.values()]))
    return 0


def table(by_policy: dict[str, Result]) -> list[str]:
    """Lines of text, one a policy; throughput relative to static and to balanced where these were simulated."""
    lines = [
        f"{'policy':18s} {'x static':>9s} {'of balanced':>11s} {'max/mean':>9s} {'worst':>7s} {'fetched':>8s} "
        f"{'kept':>6s} {'local':>6s} {'MB fast':>8s} {'MB slow':>8s} {'step':>8s}"
    ]
    for result in by_policy.values():
        relative = [relative_to(by_policy, name, result) for name in ("static", "balanced")]
        shown = [f"{value:.3f}" if value is not None else "-" for value in relative]
        lines.append(
            f"{result.policy:18s} {shown[0]:>9s} {shown[1]:>11s} {result.imbalance_mean:9.4f} "
            f"{result.imbalance_worst:7.3f} {result.fetched:8.1f} {result.kept:6.1f} {result.local_share:6.3f} "
            f"{result.cost.bytes_fast / 1e6:8.0f} {result.cost.bytes_slow / 1e6:8.0f} {result.cost.seconds:7.2f}s"
            f"{'' if result.fits else '  beyond the cap'}"
        )
    return lines


def relative_to(by_policy: dict[str, Result], name: str, result: Result) -> float | None:
    """Throughput of `result` over that of the policy `name`."""
    return by_policy[name].cost.seconds / result.cost.seconds if name in by_policy else None


def _scenarios(args: argparse.Namespace) -> list[Scenario]:
    scenarios = []
    for name in args.models.split(","):
        for text in args.ep.split(","):
            if not text.isdigit() or int(text) < 1 or int(text) % args.gpus_per_node:
                raise InputError(f"--ep names {text!r}, but must be multiples of --gpus-per-node {args.gpus_per_node}")
            with naming_flags(model="--models", shape="--models"):
                cluster = ClusterSpec(int(text) // args.gpus_per_node, args.gpus_per_node, args.replica_slots)
                options = PlanOptions(
                    balance=args.balance,
                    effort=args.effort,
                    kept_bytes=args.kept_bytes,
                    transport=args.transport,
                    shape=find_model(name),
                    device=find_device(args.device),
                    sequence_length=args.sequence_length,
                )
            scenarios.append(Scenario(cluster, options))
    return scenarios


def _generated(args: argparse.Namespace, scenario: Scenario) -> np.ndarray:
    """Of as many layers as are asked for, a sample of the model's."""
    shape = scenario.options.shape
    sizes = min(shape.layers, args.layers), args.micro_batches, shape.experts, shape.top_k
    tokens = args.tokens * scenario.cluster.num_ranks
    return workload(args.workload, *sizes, tokens, max_mean=args.max_mean, seed=args.seed)


def _row(scenario: Scenario, result: Result) -> dict[str, object]:
    return {
        "model": scenario.options.shape.name,
        "ep": scenario.cluster.num_ranks,
        "policy": result.policy,
        "modelled_seconds": result.cost.seconds,
        "imbalance_mean": result.imbalance_mean,
        "imbalance_worst": result.imbalance_worst,
        "fetched_mean": result.fetched,
        "kept_mean": result.kept,
        "local_share": None if np.isnan(result.local_share) else result.local_share,
        "fits": result.fits,
        "bytes_fast": result.cost.bytes_fast,
        "bytes_slow": result.cost.bytes_slow,
    }
