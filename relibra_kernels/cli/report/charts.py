"""Charts of the report. Bars are HTML, which keeps its letters readable at any width; heat maps are inline SVG."""

import html
import math
from collections.abc import Sequence

import numpy as np

from ...planner import Result
from ...planner.simulation.simulate import OURS
from .style import HEAT, PARTS

_FLAT = 1.005
_KINDS = {OURS: "ours", "static": "static", "balanced": "static"}


def legend(kinds: dict[str, str], shape: str = "") -> str:
    """shape: " mark" where the marks have the forms of `dots`."""
    return (
        "<p>"
        + " ".join(
            f"<span class=keyed><span class='key {kind}{shape}'></span>{name}</span>" for kind, name in kinds.items()
        )
        + "</p>"
    )


def _axis(top: float, unit: str = "") -> str:
    """Ticks from 0 to `top`, four or five of them."""
    step = 10 ** math.floor(math.log10(top / 4)) if top > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5)
    ticks = [i * step for i in range(int(top / step + 1e-9) + 1)]
    marks = "".join(f"<span style='left:{100 * tick / top:.1f}%'>{tick:g}{unit}</span>" for tick in ticks)
    return f"<div class='bar axis'><span class=name></span><span class=track>{marks}</span><span></span></div>"


def _row(name: str, inside: str, label: str) -> str:
    return (
        f"<div class=bar><span class=name>{html.escape(name)}</span><span class=track>{inside}</span>"
        f"<span>{label}</span></div>"
    )


def dots(lines: Sequence[tuple[str, list[tuple[str, float, str]]]]) -> str:
    """A line a case, on it a mark for each (kind, value, name); the last mark's value stands beside it."""
    top = max(1.0, *(value for _, marks in lines for _, value, _ in marks)) * 1.05
    rows = []
    for name, marks in lines:
        inside = f"<span class=one style='left:{100 / top:.1f}%'></span>" + "".join(
            f"<span class='dot {kind}' style='left:{100 * value / top:.1f}%' title='{who} {value:.3f}'></span>"
            for kind, value, who in marks
        )
        rows.append(_row(name, inside, f"{marks[-1][1]:.3f}" if marks else ""))
    return "".join(rows) + _axis(top)


def bars(values: Sequence[tuple[str, float, str]]) -> str:
    """A bar a policy, with a line at 1."""
    top = max(1.0, *(value for _, value, _ in values)) * 1.05
    rows = [
        _row(
            name,
            f"<i class={_KINDS.get(name, 'baseline')} style='width:{100 * value / top:.1f}%'></i>"
            f"<span class=one style='left:{100 / top:.1f}%'></span>",
            label,
        )
        for name, value, label in values
    ]
    return "".join(rows) + _axis(top)


def stacked(results: Sequence[Result]) -> str:
    """Seconds of every policy, a piece for each part of the cost."""
    top = max(result.cost.seconds for result in results) or 1.0
    keys = " ".join(
        f"<span class=keyed><span class=key style='background:{c}'></span>{part}</span>" for part, c in PARTS.items()
    )
    rows = []
    for result in results:
        parts = [(part, getattr(result.cost, part), colour) for part, colour in PARTS.items()]
        inside = "".join(
            f"<i style='width:{100 * seconds / top:.2f}%;background:{colour}' title='{part} {seconds:.3f} s'></i>"
            for part, seconds, colour in parts
            if seconds > 0
        )
        rows.append(_row(result.policy, inside, f"{result.cost.seconds:#.3g} s"))
    return f"<p>{keys}</p>{''.join(rows)}{_axis(top, ' s')}"


def _ratio(result: Result) -> np.ndarray:
    mean = result.rank_load.mean(2)
    return np.divide(result.rank_load.max(2), mean, out=np.ones(mean.shape), where=mean > 0)


def flatness(result: Result) -> str:
    """In words: how even the map is, and where it is worst."""
    ratio = _ratio(result)
    layer, micro_batch = np.unravel_index(int(ratio.argmax()), ratio.shape)
    worst = f"{ratio.max():.3f} at layer {layer}, micro-batch {micro_batch}"
    if ratio.max() <= _FLAT:
        return f"flat, and that is the result: no micro-batch is above {ratio.max():.3f}"
    return f"mean {ratio.mean():.3f}, worst {worst}"


def heat_map(result: Result) -> str:
    """A cell a layer and micro-batch, one path a colour."""
    ratio = _ratio(result)
    layers, micro_batches = ratio.shape
    level = np.searchsorted([bound for bound, _ in HEAT], ratio)
    paths = []
    for number, (_, colour) in enumerate(HEAT):
        runs = []
        for layer in range(layers):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], level[layer] == number, [0]]).astype(np.int8)))
            runs += [f"M{a} {layer}h{b - a}v1h{a - b}z" for a, b in zip(edges[::2], edges[1::2], strict=True)]
        if runs:
            paths.append(f"<path fill='{colour}' d='{''.join(runs)}'/>")
    label = html.escape(f"{result.policy}: {flatness(result)}", quote=True)
    return (
        f"<svg viewBox='0 0 {micro_batches} {layers}' preserveAspectRatio=none shape-rendering=crispEdges role=img "
        f'aria-label="{label}">{"".join(paths)}</svg>'
    )


def colour_bar() -> str:
    """The scale of the heat maps: under each colour, the ratio up to which it goes."""
    cells = "".join(
        f"<span><i style='background:{colour}'></i>{'more' if math.isinf(bound) else f'{bound:g}'}</span>"
        for bound, colour in HEAT
    )
    return f"<div class=scale>{cells}</div>"
