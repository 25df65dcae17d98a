"""The HTML page of `relibra simulate`: one file, plots as inline SVG, readable without a network."""

import html
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..planner import Result, Scenario
from ..planner.files import written_whole
from ..planner.simulation.simulate import OURS

_PARTS = {  # of a step's cost, with the colour of each
    "dense": "#9aa5b1",
    "experts": "#3b7dd8",
    "exchange": "#e0a030",
    "fetched": "#c0504d",
    "kept": "#8064a2",
    "migration": "#4bacc6",
    "fixed": "#d0d4d9",
}
_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1100px;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f5f5f5}svg text{font:11px system-ui}
.note{color:#666}.row{display:flex;gap:2em;flex-wrap:wrap}.key{display:inline-block;width:.8em;height:.8em}"""


def write_report(path: Path, results: list[tuple[Scenario, dict[str, Result]]]) -> None:
    """Write the page whole or not at all."""
    page = "\n".join(
        [
            "<!doctype html><html lang=en><head><meta charset=utf-8><title>relibra simulate</title>",
            f"<style>{_STYLE}</style></head><body><h1>relibra simulate</h1>",
            "<p class=note>Modelled, not measured. Step times come from FLOPs, tile rounding, bandwidths and what "
            "hides behind attention; max/mean and counts of replicas are exact for the load tables used.</p>",
            "<p class=note>Forced balanced routing sends every expert the same; it is a yardstick, not a policy. "
            "A plan whose kept replicas let more tokens stay on their node can be faster than it. A rival that needs "
            "more memory for copies than the cap allows is shown without it, and marked.</p>",
            _winners(results),
            *(_section(scenario, by_policy) for scenario, by_policy in results),
            "</body></html>",
        ]
    )
    with written_whole(path) as file:
        file.write(page.encode())


def _winners(results: list[tuple[Scenario, dict[str, Result]]]) -> str:
    """Which policy within the cap is fastest where."""
    rows = []
    for scenario, by_policy in results:
        able = [result for result in by_policy.values() if result.fits and result.policy != "balanced"]
        if not able:
            continue
        first, *others = sorted(able, key=lambda result: result.cost.seconds)
        ahead = f"{others[0].cost.seconds / first.cost.seconds:.3f} x {others[0].policy}" if others else "alone"
        name = html.escape(f"{scenario.options.shape.name}, EP {scenario.cluster.num_ranks}")
        rows.append(f"<tr><td>{name}<td>{first.policy}<td>{ahead}</tr>")
    return (
        f"<h2>Fastest within the cap</h2><table><tr><th>case<th>policy<th>ahead of the next</tr>{''.join(rows)}</table>"
    )


def _section(scenario: Scenario, by_policy: dict[str, Result]) -> str:
    title = html.escape(
        f"{scenario.options.shape.name}, EP {scenario.cluster.num_ranks}, {scenario.options.device.name}"
    )
    rows = list(by_policy.values())
    best = by_policy.get("balanced", min(rows, key=lambda result: result.cost.seconds)).cost.seconds
    throughput = [
        (result.policy, best / result.cost.seconds, f"{best / result.cost.seconds:.3f}{'' if result.fits else ' *'}")
        for result in rows
    ]
    replicas = [
        (result.policy, result.fetched, f"{result.fetched:.1f} fetched, {result.kept:.1f} kept a layer")
        for result in rows
    ]
    keys = " ".join(f"<span class=key style='background:{c}'></span> {name}" for name, c in _PARTS.items())
    maps = "".join(
        f"<div><h3>max/mean by layer and micro-batch: {name}</h3>{_heat_map(by_policy[name])}</div>"
        for name in ("static", OURS)
        if name in by_policy
    )
    return "\n".join(
        [
            f"<h2>{title}</h2>",
            _table(rows),
            f"<div class=row><div><h3>Throughput, balanced = 1; * beyond the cap</h3>{_bars(throughput)}</div>",
            f"<div><h3>Replicas</h3>{_bars(replicas)}</div></div>",
            f"<h3>Seconds of a step</h3><p>{keys}</p>{_stacked(rows)}",
            f"<div class=row>{maps}</div>",
        ]
    )


def _table(rows: list[Result]) -> str:
    head = ["policy", "max/mean", "worst", "step (s)", "MB fast", "MB slow", "planning, measured (s)"]
    body = (
        f"<tr><td>{r.policy}<td>{r.imbalance_mean:.4f}<td>{r.imbalance_worst:.3f}<td>{r.cost.seconds:.3f}"
        f"<td>{r.cost.bytes_fast / 1e6:.0f}<td>{r.cost.bytes_slow / 1e6:.0f}<td>{r.planning_seconds:.2f}</tr>"
        for r in rows
    )
    return f"<table><tr>{''.join(f'<th>{cell}' for cell in head)}</tr>{''.join(body)}</table>"


def _bars(values: Iterable[tuple[str, float, str]]) -> str:
    values = list(values)
    top = max((value for _, value, _ in values), default=0) or 1
    lines = [
        f"<text x=0 y={20 * i + 14}>{name}</text><rect x=120 y={20 * i + 4} width={value / top * 240:.1f} height=13 "
        f"fill='{'#2f8f4e' if name == OURS else '#3b7dd8'}'/><text x={value / top * 240 + 126:.1f} y={20 * i + 14}>"
        f"{label}</text>"
        for i, (name, value, label) in enumerate(values)
    ]
    return f"<svg width=500 height={20 * len(values) + 6}>{''.join(lines)}</svg>"


def _stacked(rows: list[Result]) -> str:
    top = max(result.cost.seconds for result in rows)
    lines = []
    for i, result in enumerate(rows):
        lines.append(f"<text x=0 y={20 * i + 14}>{result.policy}</text>")
        left = 120.0
        for part, colour in _PARTS.items():
            seconds = getattr(result.cost, part)
            width = seconds / top * 800
            lines.append(
                f"<rect x={left:.1f} y={20 * i + 4} width={width:.1f} height=13 fill='{colour}'>"
                f"<title>{part}: {seconds:.3f} s</title></rect>"
            )
            left += width
    return f"<svg width=940 height={20 * len(rows) + 6}>{''.join(lines)}</svg>"


def _heat_map(result: Result) -> str:
    mean = result.rank_load.mean(2)
    ratio = np.divide(result.rank_load.max(2), mean, out=np.ones(mean.shape), where=mean > 0)
    layers, micro_batches = ratio.shape
    width, height = max(2.0, 420 / micro_batches), max(2.0, min(12.0, 300 / layers))
    cells = [
        f"<rect x={m * width:.1f} y={layer * height:.1f} width={width:.1f} height={height:.1f} "
        f"fill='{_colour(ratio[layer, m])}'><title>layer {layer}, micro-batch {m}: {ratio[layer, m]:.3f}</title></rect>"
        for layer in range(layers)
        for m in range(micro_batches)
    ]
    size = f"width={micro_batches * width:.0f} height={layers * height:.0f}"
    return f"<svg {size}>{''.join(cells)}</svg><p class=note>white 1.00, yellow 1.5, red 3 and above</p>"


def _colour(ratio: float) -> str:
    """White at 1, yellow at 1.5, red from 3."""
    if ratio <= 1.5:
        return f"rgb(255,255,{int(255 * (1 - (ratio - 1) / 0.5))})"
    return f"rgb(255,{int(255 * max(0.0, (3 - ratio) / 1.5))},0)"
