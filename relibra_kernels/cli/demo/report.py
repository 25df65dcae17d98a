"""What the demo prints and saves: one table, one plot, one summary."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from .policies import RANKS, Policy
from .toy import POPULARITY_WEIGHT

NAMES = {"static": "static placement", "planned": "ReLibra plan", "balanced": "balanced by force"}


def summarise(policies: dict[str, Policy], results: dict[str, Any]) -> dict[str, Any]:
    """The measured results, with what the plans say."""
    summary = dict(results)
    for name, policy in policies.items():
        ratios = np.concatenate([(load.max(-1) / load.mean(-1)).reshape(-1) for load in policy.loads])
        summary[f"{name}_max_mean"] = float(ratios.mean())
        summary[f"{name}_max_mean_worst"] = float(ratios.max())
        summary[f"{name}_replicas"] = float(np.mean([(plan.replicas >= 0).sum((2, 3)) for plan in policy.plans]))
        moves = [(plan.home != policy.plans[i - 1].home).sum() for i, plan in enumerate(policy.plans)]
        summary[f"{name}_experts_moved"] = float(np.mean(moves))
    summary["speedup"] = summary["static_s"] / summary["planned_s"]
    lost = summary["static_s"] - summary["balanced_s"]
    spread = sum(np.diff(summary[f"{name}_s_quartiles"])[0] for name in ("static", "balanced"))
    summary["recovered"] = (summary["static_s"] - summary["planned_s"]) / lost if lost > spread else None
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary for a reader."""
    rows = [("", *NAMES.values())]

    def row(label: str, cell: Any) -> None:
        rows.append((label, *(cell(name) for name in NAMES)))

    row("max/mean over ranks, mean", lambda n: f"{summary[f'{n}_max_mean']:.3f}")
    row("max/mean over ranks, worst", lambda n: f"{summary[f'{n}_max_mean_worst']:.3f}")
    row("step time, median (measured)", lambda n: f"{summary[f'{n}_s']:.3f} s")
    row("  quartiles", lambda n: "{:.3f}-{:.3f} s".format(*summary[f"{n}_s_quartiles"]))
    row("  ratio to balanced", lambda n: f"{summary[f'{n}_s'] / summary['balanced_s']:.3f}")
    row("replicas a layer and micro-batch", lambda n: f"{summary[f'{n}_replicas']:.2f}")
    row("experts moved a step", lambda n: f"{summary[f'{n}_experts_moved']:.1f}")
    row("MB moved a step: tokens", lambda n: f"{summary[f'{n}_token_bytes_per_step'] / 1e6:.1f}")
    row("  replicas and their gradients", lambda n: f"{summary[f'{n}_replica_bytes_per_step'] / 1e6:.1f}")
    row("  migration with optimizer state", lambda n: f"{summary[f'{n}_migration_bytes_per_step'] / 1e6:.1f}")
    widths = [max(len(line[i]) for line in rows) for i in range(4)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines) + "\n\n" + "\n".join(textwrap.wrap(_notes(summary), 110))


def _notes(summary: dict[str, Any]) -> str:
    gained = "what forced balance gives is within this run's noise"
    if summary["recovered"] is not None:
        gained = f"{summary['recovered']:.0%} of what forced balance gives"
    verdict = f"The planned step is {summary['speedup']:.2f}x as fast as the static one: {gained}. "
    if too_noisy(summary):
        verdict = (
            f"WARNING: this run was too noisy to say which is faster: {_why(summary)}. "
            "Repeat it on an idle machine, or with more --repeats and a longer --time-limit. "
        )
    return (
        f"{verdict}"
        f"Parity with one process, fp32, largest relative error: loss {summary['parity_loss']:.1e}, "
        f"gradients {summary['parity_grad']:.1e}, parameters after a migration {summary['parity_parameters']:.1e}. "
        f"Times are measured on this machine's CPU: {RANKS} ranks of one thread, {_rounds(summary)}, "
        f"migration included; planning, {summary['plan_seconds']:.3f} s a batch, is not. "
        "The routing is real, its skew partly made: "
        f"in the toy training a loss of weight {POPULARITY_WEIGHT} makes some experts popular."
    )


def too_noisy(summary: dict[str, Any]) -> bool:
    """Whether the times of static and planned steps cannot be told apart."""
    return bool(_why(summary))


def _why(summary: dict[str, Any]) -> str:
    """Why nothing can be concluded from the times; empty where it can."""
    if summary["rounds"] < 3:  # quartiles of one or two say nothing about the spread
        return f"too few timed rounds ({summary['rounds']})"
    static, planned = summary["static_s_quartiles"], summary["planned_s_quartiles"]
    overlap = static[0] <= planned[1] and planned[0] <= static[1]
    return "quartiles of static and planned steps overlap" if overlap else ""


def _rounds(summary: dict[str, Any]) -> str:
    done, asked = summary["rounds"], summary["repeats"]
    return f"{done} interleaved rounds" + (f" of {asked}, which the time limit ended" if done < asked else "")


def save_summary(summary: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")


def plot_loads(policies: dict[str, Policy], path: Path) -> None:
    """Load of every rank in every (layer, micro-batch) of the first batch, before and after, over the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for axis, name in zip(axes, ("static", "planned"), strict=True):
        load = policies[name].loads[0]
        layers, micro_batches, ranks = load.shape
        relative = (load / load.mean(-1, keepdims=True)).reshape(-1, ranks)
        place = np.arange(len(relative))
        for rank in range(ranks):
            axis.bar(
                place + (rank - (ranks - 1) / 2) * 0.8 / ranks, relative[:, rank], 0.8 / ranks, label=f"rank {rank}"
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("load / mean")
        axis.set_title(f"{NAMES[name]}: busiest rank {relative.max(1).mean():.2f} x the mean")
        axis.set_xticks(place, [f"{layer}.{m}" for layer in range(layers) for m in range(micro_batches)])
    axes[0].set_ylim(0, RANKS * 1.2)
    axes[0].legend(loc="upper right", ncols=RANKS)
    axes[1].set_xlabel("layer . micro-batch")
    figure.savefig(path, dpi=120)
