"""The figures of a plan beside those of static placement: what it gains, what it moves, what memory it takes."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..planner import BatchPlan, ClusterSpec, PlanOptions, Setting, outcome_of_plan, price, static_plan
from ..planner.loads import total_loads
from ..planner.plan import contiguous_home
from ..planner.pricing.balanced import forced_balanced


def report_of(plan: BatchPlan, loads: np.ndarray, options: PlanOptions, previous: np.ndarray | None) -> dict[str, Any]:
    """The figures of a plan. Moves are counted from `previous`, or from contiguous homes; bytes are of one step.

    `modelled_over_balanced` is over forced balanced routing with the same transport, `modelled_over_one_hop_balanced`
    over that with one hop.
    """
    table = total_loads(loads)
    cluster = ClusterSpec(plan.num_ranks // plan.gpus_per_node, plan.gpus_per_node, plan.num_slots)
    setting = Setting(
        replace(options.shape, experts=plan.num_experts),
        options.device,
        plan.gpus_per_node,
        options.sequence_length,
        options.transport,
    )
    before = contiguous_home(plan.num_layers, plan.num_experts, plan.num_ranks) if previous is None else previous
    static = static_plan(table, cluster)
    outcome, unplanned = outcome_of_plan(plan, loads, before), outcome_of_plan(static, loads)
    cost, before_cost = price(outcome, setting), price(unplanned, setting)
    balanced = forced_balanced(table, cluster)
    bound = price(balanced, setting).seconds
    one_hop = price(balanced, replace(setting, transport="one")).seconds
    pairs = plan.num_layers * plan.num_micro_batches
    fetched = ((plan.replicas >= 0) & ~plan.kept[:, None]).sum(3).max(initial=0)
    kept_bytes = int(plan.kept.sum((0, 2)).max(initial=0) * options.shape.copy_bytes)
    return {
        "imbalance_mean": plan.imbalance_mean(loads),
        "imbalance_worst": plan.imbalance_worst(loads),
        "static_imbalance_mean": static.imbalance_mean(loads),
        "static_imbalance_worst": static.imbalance_worst(loads),
        "modelled_seconds": cost.seconds,
        "static_modelled_seconds": before_cost.seconds,
        "modelled_over_balanced": cost.seconds / bound if bound else 1.0,
        "modelled_over_one_hop_balanced": cost.seconds / one_hop if one_hop else 1.0,
        "static_modelled_over_balanced": before_cost.seconds / bound if bound else 1.0,
        "replicas_mean": float(outcome.pushed_in.sum(2).mean()),
        "busiest_sender_mean": float(outcome.pushed_out.max(2).mean()),
        "kept_mean": float(plan.kept.sum((1, 2)).mean()),
        "kept_bytes_worst": kept_bytes,
        "memory_bytes_worst": kept_bytes + int(fetched * options.shape.copy_bytes),
        "moves_mean": float(outcome.moved_in.sum(1).mean()),
        "migration_bytes": int(outcome.moved_in.sum() * options.shape.migration_bytes),
        "local_share": 1.0 if np.isnan(outcome.local_share) else outcome.local_share,
        "bytes_fast": cost.bytes_fast,
        "bytes_slow": cost.bytes_slow,
        "step_bytes_fast": cost.bytes_fast * pairs,
        "step_bytes_slow": cost.bytes_slow * pairs,
    }


def lines_of(report: dict[str, Any], written: str) -> list[str]:
    """For people; the last line is what the plan gains."""
    gain = report["static_modelled_seconds"] / report["modelled_seconds"] if report["modelled_seconds"] else 1.0
    verdict = f"{gain:.2f}x as fast" if gain >= 1.005 else "no gain: nothing pays here"
    over = report["modelled_over_one_hop_balanced"]
    one_hop = "" if over == report["modelled_over_balanced"] else f", {over:.4f} of it with one hop"
    return [
        f"modelled step: {report['modelled_over_balanced']:.4f} of forced balanced routing "
        f"(static {report['static_modelled_over_balanced']:.4f}){one_hop}; "
        f"{report['local_share']:.1%} of the assignments stay on their node",
        f"per layer: {report['kept_mean']:.1f} kept replicas, up to {report['kept_bytes_worst'] / 1e9:.2f} GB "
        f"of a rank; {report['moves_mean']:.1f} experts moved",
        f"per layer and micro-batch: {report['replicas_mean']:.1f} fetched replicas, at most "
        f"{report['busiest_sender_mean']:.1f} from one rank",
        f"plan {written}",
        f"what it takes: {report['memory_bytes_worst'] / 1e9:.2f} GB of a rank; for replicas and moves of a step "
        f"{report['step_bytes_fast'] / 1e9:.2f} GB in nodes, {report['step_bytes_slow'] / 1e9:.2f} GB between them",
        f"static -> plan: max/mean {report['static_imbalance_mean']:.3f} -> {report['imbalance_mean']:.3f} "
        f"(worst {report['static_imbalance_worst']:.2f} -> {report['imbalance_worst']:.2f}), modelled step "
        f"{report['static_modelled_seconds']:.3g} s -> {report['modelled_seconds']:.3g} s: {verdict}",
    ]
