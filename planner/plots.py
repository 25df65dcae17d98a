"""Plots of traces and plans, with matplotlib, which only these need. Colours are of the Okabe-Ito palette."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"
_SIZE = (7.0, 3.2)  # inches


def plot_load(ratio_LE: np.ndarray, layer_ids: tuple[int, ...], ax: "Axes | None" = None) -> "Axes":
    """A map of how often each expert of each layer was chosen: 1 is the mean of its layer's experts."""
    ax = _axes() if ax is None else ax
    shown = ax.imshow(ratio_LE, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    ax.set_yticks(range(len(layer_ids)), [str(layer) for layer in layer_ids])
    ax.yaxis.set_major_locator(_few_ticks())
    ax.set(xlabel="expert", ylabel="MoE layer", title=f"hottest expert {ratio_LE.max(initial=0):.1f} times the mean")
    ax.figure.colorbar(shown, ax=ax, label="choices over the mean")
    return ax


def plot_balance(static_LM: np.ndarray, planned_LM: np.ndarray, ax: "Axes | None" = None) -> "Axes":
    """max/mean over ranks of each layer, mean over micro-batches, static placement beside the plan; nan: no load."""
    ax = _axes() if ax is None else ax
    layer = np.arange(len(static_LM))
    for table, side, color, label in (
        (static_LM, -0.2, _ORANGE, "static placement"),
        (planned_LM, 0.2, _BLUE, "plan"),
    ):
        ratios = [_mean(row) for row in table]
        ax.bar(layer + side, ratios, 0.4, color=color, label=label)
    ax.axhline(1.0, color=_GREY, linewidth=0.8)
    title = f"max/mean over ranks: {_mean(static_LM):.3f} -> {_mean(planned_LM):.3f}"
    ax.set(xlabel="MoE layer", ylabel="busiest rank over the mean", title=title)
    return _finished(ax)


def plot_replicas(kept_L: np.ndarray, fetched_L: np.ndarray, moved_L: np.ndarray, ax: "Axes | None" = None) -> "Axes":
    """What a plan does in each layer: kept replicas, fetched ones a micro-batch, experts not in contiguous order."""
    ax = _axes() if ax is None else ax
    layer = np.arange(len(kept_L))
    ax.bar(layer - 0.27, kept_L, 0.27, color=_BLUE, label="kept replicas")
    ax.bar(layer, fetched_L, 0.27, color=_ORANGE, label="fetched replicas a micro-batch")
    ax.bar(layer + 0.27, moved_L, 0.27, color=_GREY, label="experts away from their contiguous home")
    ax.set(xlabel="MoE layer", ylabel="experts", title="what the plan does")
    return _finished(ax)


def _mean(ratios: np.ndarray) -> float:
    return float(np.nanmean(ratios)) if np.isfinite(ratios).any() else 1.0


def _finished(ax: "Axes") -> "Axes":
    ax.xaxis.set_major_locator(_few_ticks())
    ax.legend(frameon=False, fontsize="small")
    return ax


def _axes() -> "Axes":
    """Of a new figure; in a notebook it shows itself."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise InputError(
            "plot needs matplotlib: pip install matplotlib, or relibra-kernels with its extra [plot]"
        ) from None
    return pyplot.figure(figsize=_SIZE, layout="constrained").add_subplot()


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=12, integer=True)
