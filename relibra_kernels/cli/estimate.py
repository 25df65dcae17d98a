"""`relibra estimate`: what a planned batch takes before it runs, and whether planning it pays."""

import argparse
import json
import time
from dataclasses import asdict

from ..planner import Estimate, estimate_plan, plan_batch
from .plan_request import add_plan_arguments, read_plan_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument(
        "--keep-replicas", action="store_true", help="fetched replicas stay until backward, as the option of training"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    batch, cluster, options, previous = read_plan_request(args)
    loads = batch.loads
    start = time.perf_counter()
    plan = plan_batch(loads, cluster, previous_home=previous, model=args.model, options=options)
    seconds = time.perf_counter() - start
    setting = options.setting(plan.num_experts, plan.gpus_per_node, keep_replicas=args.keep_replicas)
    found = estimate_plan(plan, loads, setting, previous, planning_seconds=seconds)
    print(
        f"{plan.num_layers} layers x {plan.num_micro_batches} micro-batches x {plan.num_experts} experts over "
        f"{plan.num_ranks} ranks; {options.shape.name} on {options.device.name}"
    )
    for line in _table(found):
        print(line)
    print(_verdict(found))
    if args.json:
        print(json.dumps(asdict(found) | {"memory_bytes": found.memory_bytes, "shape": options.shape.name}))
    return 0


def _verdict(found: Estimate) -> str:
    if found.does_not_pay:
        return f"does not pay: {found.does_not_pay}"
    only = ", but only if the rollout hides planning" if found.must_hide else ""
    return f"planning this batch pays{only}"


def _table(found: Estimate) -> list[str]:
    def row(name: str, *cells: str) -> str:
        return f"  {name:<36}" + "".join(f"{cell:>14}" for cell in cells)

    def gigabytes(name: str, *sizes: int) -> str:
        return row(name, *(f"{size / 1e9:.3f}" for size in sizes))

    return [
        row("modelled step", "seconds", "max/mean"),
        row("static", f"{found.static_seconds:.4f}", f"{found.static_max_mean:.3f}"),
        row("planned", f"{found.planned_seconds:.4f}", f"{found.planned_max_mean:.3f}"),
        row("planned, if planning is waited for", f"{found.planned_seconds + found.planning_seconds:.4f}", ""),
        row("forced balance", f"{found.balanced_seconds:.4f}", "1.000"),
        row("GB of the batch", "inside nodes", "between"),
        gigabytes("busiest rank: tokens (modelled)", found.token_fast_bytes, found.token_slow_bytes),
        gigabytes("busiest rank: replicas, moves", found.replica_fast_bytes, found.replica_slow_bytes),
        gigabytes("all ranks: fetched replicas", found.fetched_fast_bytes, 0),
        gigabytes("all ranks: kept replicas", found.kept_fast_bytes, found.kept_slow_bytes),
        row("all ranks: moved experts", "", f"{found.migration_bytes / 1e9:.3f}"),
        row("GB of the fullest rank's memory"),
        gigabytes("home weights", found.home_weights_bytes),
        gigabytes("gradients, fp32", found.gradient_bytes),
        gigabytes("kept replicas", found.kept_bytes),
        gigabytes("fetched replicas", found.fetched_bytes),
        gigabytes("token buffers (modelled)", found.token_buffer_bytes),
        gigabytes("activations (modelled)", found.activation_bytes),
        gigabytes("together, without optimizer", found.memory_bytes),
    ]
