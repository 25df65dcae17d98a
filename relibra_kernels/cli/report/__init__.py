"""The HTML page of `relibra simulate`: one file, readable without a network, in light and dark, on any width."""

import html
from collections.abc import Sequence
from pathlib import Path

from ...planner.files import written_whole
from ...planner.simulation.simulate import OURS
from ..simulation_table import BEYOND, COLUMNS, Case
from .charts import bars, colour_bar, dots, flatness, heat_map, legend, stacked
from .style import STYLE

_BASELINE = "best baseline"


def write_report(path: Path, cases: Sequence[Case], inputs: dict[str, str]) -> None:
    """Write the page whole or not at all. inputs: what was simulated, by name."""
    page = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>relibra simulate</title>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<style>{STYLE}</style></head><body><h1>Policies against each other, on the same routing</h1>",
        "<p class=note>Modelled, not measured: step times come from FLOPs, tile rounding, bandwidths and what hides "
        "behind attention. Max/mean, replicas and moves are exact for the load tables used.</p>",
        _summary(cases),
        _inputs(inputs),
        *(_section(case) for case in cases),
        _columns(),
        "</body></html>",
    ]
    with written_whole(path) as file:
        file.write("\n".join(page).encode())


def _best(case: Case) -> tuple[str | None, str | None]:
    """(the fastest policy within the cap, the fastest of the others); balanced is none. Of equals ours comes first."""
    able = sorted(
        (r for r in case.rows.values() if r.fits and r.policy not in ("balanced", "static")),
        key=lambda r: (r.cost.seconds, r.policy != OURS),
    )
    baselines = [r.policy for r in able if r.policy != OURS]
    return (able[0].policy if able else None), (baselines[0] if baselines else None)


def _is_level(case: Case) -> bool:
    """Whether ours is the fastest, and another as fast within what the model can tell."""
    best, baseline = _best(case)
    if best != OURS or baseline is None:
        return False
    return case.rows[baseline].cost.seconds <= 1.001 * case.rows[OURS].cost.seconds


def _summary(cases: Sequence[Case]) -> str:
    """Who wins where, in words and one chart."""
    won = sum(_best(case)[0] == OURS for case in cases)
    words = f"<b>{OURS}</b> is the fastest policy within the memory cap in {won} of {len(cases)} cases"
    if len(cases) == 1:
        words = words.removesuffix("s")
    level = [f"{html.escape(case.title)} ({_best(case)[1]})" for case in cases if _is_level(case)]
    if level:
        words += f", level with another to 0.1% in: {'; '.join(level)}"
    gains = [
        case.rows["static"].cost.seconds / case.rows[OURS].cost.seconds
        for case in cases
        if {"static", OURS} <= case.rows.keys()
    ]
    if gains:
        words += f", {min(gains):.2f} to {max(gains):.2f} times as fast as static placement" if len(gains) > 1 else (
            f", {gains[0]:.2f} times as fast as static placement"
        )  # fmt: skip
    lost = [f"{html.escape(case.title)} ({best})" for case in cases if (best := _best(case)[0]) not in (OURS, None)]
    words += f". Another policy is faster in: {'; '.join(lost)}." if lost else "."
    lines = []
    for case in cases:
        baseline, rows = _best(case)[1], case.rows
        base = rows["balanced"].cost.seconds
        marks = [(kind, base / rows[name].cost.seconds, name) for kind, name in
                 (("static", "static"), ("baseline", baseline), ("ours", OURS)) if name in rows]  # fmt: skip
        lines.append((case.title, marks))
    return (
        f"<h2>Summary</h2><p>{words}</p>"
        f"<h3>Throughput over forced balanced routing (1 = perfectly balanced)</h3>"
        f"{legend({'static': 'static', 'baseline': _BASELINE, 'ours': OURS}, ' mark')}{dots(lines)}"
        "<p class=note>Forced balanced routing gives every expert the same: a yardstick, not a policy. A plan whose "
        "kept replicas let more tokens stay on their node can be faster than it.</p>"
    )


def _inputs(inputs: dict[str, str]) -> str:
    rows = "".join(f"<tr><th scope=row>{html.escape(k)}<td>{html.escape(v)}</tr>" for k, v in inputs.items())
    return f"<h2>What was simulated</h2><div class=wide><table class=inputs>{rows}</table></div>"


def _columns() -> str:
    rows = "".join(f"<tr><th scope=row>{column.name}<td>{column.meaning}</tr>" for column in COLUMNS)
    return f"<h2>Columns</h2><div class=wide><table class=inputs>{rows}</table></div>"


def _section(case: Case) -> str:
    rows = list(case.rows.values())
    base = case.rows["balanced"].cost.seconds
    throughput = [
        (r.policy, base / r.cost.seconds, f"{base / r.cost.seconds:.3f}{'' if r.fits else ' *'}") for r in rows
    ]
    failed = "".join(
        f"<p class=failed><b>{html.escape(name)}</b> failed: {html.escape(why)}</p>"
        for name, why in case.failed.items()
    )
    star = "" if all(r.fits for r in rows) else f"<p class=note>* {BEYOND} of memory: shown without it.</p>"
    shown = [case.rows[name] for name in ("static", OURS) if name in case.rows]
    maps = "".join(f"<figure><figcaption>{r.policy}: {flatness(r)}</figcaption>{heat_map(r)}</figure>" for r in shown)
    return "\n".join(
        [
            f"<section><h2>{html.escape(case.title)}</h2>{_table(case)}{failed}",
            f"<h3>Throughput over forced balanced routing</h3>{bars(throughput)}{star}",
            f"<h3>Seconds of a step, by what they are spent on</h3>{stacked(rows)}",
            f"<h3>Busiest rank over the mean: layers down, micro-batches across</h3><div class=maps>{maps}</div>"
            f"{colour_bar()}</section>",
        ]
    )


def _table(case: Case) -> str:
    head = "".join(f"<th scope=col title='{html.escape(c.meaning)}'>{c.name}" for c in COLUMNS)
    body = "".join(
        f"<tr{' class=ours' if r.policy == OURS else ''}><th scope=row>{html.escape(r.policy)}{'' if r.fits else ' *'}"
        f"{''.join(f'<td>{c.cell(case.rows, r)}' for c in COLUMNS)}</tr>"
        for r in case.rows.values()
    )
    return f"<div class=wide><table><tr><th scope=col>policy{head}</tr>{body}</table></div>"
