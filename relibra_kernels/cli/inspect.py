"""`relibra inspect`: what is in a trace, a plan or a load table, in one screen; two plans side by side."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..planner import BatchPlan, ModelShape, RoutingTrace, check_loads, count_loads, find_model
from ..planner.errors import FormatError, InputError
from ..planner.files import load_npz, npz_keys
from ..planner.loads import total_loads
from ..planner.plan import contiguous_home
from .inputs import SHAPE_HELP

LAYERS_SHOWN = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.npz", type=Path, help="a trace, a plan or a load table")
    parser.add_argument("other", metavar="OTHER.npz", type=Path, nargs="?", help="a second plan, to compare with")
    parser.add_argument("--num-experts", type=int, metavar="E", help="for a trace that does not say it")
    parser.add_argument(
        "--loads", type=Path, metavar="LOADS.npz", help="of a plan: what it was made for, for its balance"
    )
    parser.add_argument("--previous", type=Path, metavar="PLAN.npz", help="of a plan: the one before, for what moves")
    parser.add_argument("--shape", help=f"of a plan: whose experts it moves, for bytes: {SHAPE_HELP}")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead")


def run(args: argparse.Namespace) -> int:
    if args.other is not None:
        return _compare(args)
    keys = npz_keys(args.file)
    if "expert_ids" in keys:
        found = inspect_trace(RoutingTrace.load(args.file, args.num_experts))
    elif "home" in keys:
        loads = None if args.loads is None else _loads(args.loads)
        previous = None if args.previous is None else BatchPlan.load(args.previous).home
        found = inspect_plan(BatchPlan.load(args.file, loads), loads, previous, args.shape)
    elif "loads" in keys:
        found = inspect_loads(_loads(args.file))
    else:
        raise FormatError(f"{args.file}: is no trace, plan or load table; it has {sorted(keys)}")
    if "home" not in keys and any(value is not None for value in (args.loads, args.shape, args.previous)):
        raise InputError(f"--loads, --previous and --shape are for a plan, but {args.file} is a {found['kind']}")
    found["bytes_on_disk"] = args.file.stat().st_size
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(lines_of(args.file, found)))
    return 0


def _compare(args: argparse.Namespace) -> int:
    """Two plans side by side; the second one's moves are counted from the first one's homes."""
    loads = None if args.loads is None else _loads(args.loads)
    previous = None if args.previous is None else BatchPlan.load(args.previous).home
    first, second = (BatchPlan.load(path) for path in (args.file, args.other))
    if _sizes(first) != _sizes(second):
        raise InputError(
            f"{args.other} is for [layers, experts, ranks] {_sizes(second)}, but {args.file} for {_sizes(first)}: "
            "they must be alike"
        )
    plans = [inspect_plan(plan, loads, previous, args.shape) for plan in (first, second)]
    differing = int((first.home != second.home).sum())
    same = first.replicas.shape == second.replicas.shape and np.array_equal(first.replicas, second.replicas)
    if args.json:
        print(json.dumps({"plans": plans, "homes_that_differ": differing, "same_replicas": bool(same)}))
        return 0
    print(f"{'':44}{'A':>14}{'B':>14}   A = {args.file}, B = {args.other}")
    for key, value in plans[0].items():
        if key != "kind" and (value or plans[1][key]):
            print(f"{key.replace('_', ' '):44}{_cell(key, value):>14}{_cell(key, plans[1][key]):>14}")
    print(f"homes that differ: {differing} of {first.home.size}; replicas are {'the same' if same else 'others'}")
    return 0


def _sizes(plan: BatchPlan) -> tuple[int, int, int]:
    return plan.num_layers, plan.num_experts, plan.num_ranks


def _cell(key: str, value: Any) -> str:
    if "bytes" in key:
        return _bytes(value)
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


def inspect_trace(trace: RoutingTrace) -> dict[str, Any]:
    """Sizes, unknown tokens by reason, and how skewed the experts of each layer are."""
    lengths = np.diff(trace.offsets)
    report = trace.report
    loads = count_loads(trace, np.zeros(trace.num_sequences, np.int64), 1)
    return {
        "kind": "trace",
        "sequences": trace.num_sequences,
        "tokens": trace.num_tokens,
        "longest_sequence": int(lengths.max(initial=0)),
        "layers": trace.num_layers,
        "moe_layer_ids": list(trace.moe_layer_ids),
        "top_k": trace.top_k,
        "num_experts": trace.num_experts,
        "unknown_tokens": report.unknown,
        "layers_dropped": list(report.layers_dropped),
        "sequences_without_routing": list(report.sequences_without_routing),
        "policy_versions": sorted({span.version for span in trace.versions}),
        "skew_of_layer": _skew(loads),
        "bytes_in_memory": trace.compact_ids.nbytes + trace.reasons.nbytes + trace.offsets.nbytes,
    }


def inspect_loads(loads: np.ndarray) -> dict[str, Any]:
    """Sizes and skew of a load table."""
    return {
        "kind": "load table",
        "layers": loads.shape[0],
        "micro_batches": loads.shape[1],
        "source_ranks": loads.shape[2] if loads.ndim == 4 else None,
        "num_experts": loads.shape[-1],
        "assignments": int(loads.sum(dtype=np.int64)),
        "unused_experts": int((total_loads(loads).sum(1) == 0).sum()),
        "skew_of_layer": _skew(total_loads(loads)),
        "bytes_in_memory": loads.nbytes,
    }


def inspect_plan(
    plan: BatchPlan, loads: np.ndarray | None = None, previous: np.ndarray | None = None, model: str | None = None
) -> dict[str, Any]:
    """Sizes, what the plan moves and replicates, the bytes of it, and how it balances its loads where they are given.

    previous: homes before it; None: contiguous ones.
    """
    if previous is None:
        previous = contiguous_home(plan.num_layers, plan.num_experts, plan.num_ranks)
    if previous.shape != plan.home.shape:
        raise InputError(f"--previous has homes of shape {previous.shape}, but the plan {plan.home.shape}")
    moved = int((plan.home != previous).sum())
    held = plan.replicas >= 0
    fetched = held & ~plan.kept[:, None]
    found: dict[str, Any] = {
        "kind": "plan",
        "model": plan.model or model or "",
        "layers": plan.num_layers,
        "micro_batches": plan.num_micro_batches,
        "num_experts": plan.num_experts,
        "ranks": plan.num_ranks,
        "nodes": plan.num_ranks // plan.gpus_per_node,
        "replica_slots": plan.num_slots,
        "experts_moved": moved,
        "kept_replicas": int(plan.kept.sum()),
        "fetched_replicas_per_layer_and_micro_batch": float(fetched.sum((2, 3)).mean()) if plan.num_slots else 0.0,
        "assignments_at_replicas": int(plan.quota.sum(dtype=np.int64)),
        "bytes_in_memory": sum(x.nbytes for x in (plan.home, plan.replicas, plan.quota, plan.kept)),
    }
    shape = _shape(plan, model)
    if shape is not None:
        found["migration_bytes"] = moved * int(shape.migration_bytes)
        found["kept_bytes_of_busiest_rank"] = int(plan.kept.sum((0, 2)).max(initial=0) * shape.copy_bytes)
        found["fetched_bytes_a_batch"] = int(fetched.sum() * shape.expert_bytes)
    if loads is not None:
        found["imbalance_mean"], found["imbalance_worst"] = plan.imbalance_mean(loads), plan.imbalance_worst(loads)
    return found


def _shape(plan: BatchPlan, model: str | None) -> ModelShape | None:
    if model is not None:
        return find_model(model)
    try:
        return find_model(plan.model) if plan.model else None
    except InputError:  # a plan may be for a model that is in no table
        return None


def lines_of(path: Path, found: dict[str, Any]) -> list[str]:
    """At most a screen of text for people."""
    lines = [f"{path}: {found['kind']}, {_bytes(found['bytes_on_disk'])} on disk, "
             f"{_bytes(found['bytes_in_memory'])} in memory"]  # fmt: skip
    for key, value in found.items():
        if key in ("kind", "bytes_on_disk", "bytes_in_memory") or value in (None, "", [], {}):
            continue
        name = key.replace("_", " ")
        if key == "skew_of_layer":
            lines += _skew_lines(found.get("moe_layer_ids", range(len(value))), value)
        elif isinstance(value, dict):
            lines += [f"  {name}: {count:,} ({reason})" for reason, count in value.items()]
        elif isinstance(value, list):
            shown = ", ".join(map(str, value[:12]))
            lines.append(f"  {name}: {shown}{f', ... ({len(value)})' if len(value) > 12 else ''}")
        elif "bytes" in key:
            lines.append(f"  {name}: {_bytes(value)}")
        else:
            lines.append(f"  {name}: {value:,.4g}" if isinstance(value, float) else f"  {name}: {value}")
    return lines


def _skew(loads_LME: np.ndarray) -> list[float]:
    """Busiest expert over the mean one, of each layer, over all micro-batches; 0 without load."""
    totals = loads_LME.sum(1, dtype=np.int64)
    return [float(layer.max() / layer.mean()) if layer.any() else 0.0 for layer in totals]


def _skew_lines(layer_ids: Sequence[int], skew: list[float]) -> list[str]:
    middle = float(np.median(skew)) if skew else 0.0
    order = np.argsort(skew)[::-1][:LAYERS_SHOWN]
    worst = ", ".join(f"layer {layer_ids[i]}: {skew[i]:.2f}" for i in order)
    return [f"  busiest expert / mean: median {middle:.2f} over layers; most in {worst}"]


def _loads(path: Path) -> np.ndarray:
    return check_loads(load_npz(path, ("loads",))["loads"])


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
