"""Pictures of a run: reconstructions, accuracy against cost, losses of the blocks.

Matplotlib figures on the Agg canvas, without pyplot: no global state, no display, safe beside training threads. Arrays and
records in, a figure or a PNG out. Colours are Okabe and Ito's, told apart by the colour-blind, and every series has a marker
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    pass


DPI = 150

GREY = 0.5
"""What stands for a masked unit: neither the black ground of scans nor the white of drawings."""

SERIES: dict[str, dict[str, Any]] = {
    "trained": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "MAE cut to the depth": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "random initialisation": {"color": "#7F7F7F", "marker": "^", "linestyle": "-."},
}

RAW_COLOR = "#009E73"

PANELS = {
    "knn_top1": {"knn_top1": "Nearest neighbours", "linear_top1": "Linear probe"},
    "rankme": {"rankme": "RankMe"},
}
"""By what variants are compared -> the scores that are drawn, with the titles of their panels."""

WORTH = {
    "knn_top1": "top-1 accuracy on test images, %",
    "rankme": "effective rank of the embeddings",
}

COSTS = {"latency_b1_ms": "latency of one image, ms", "gflops": "GFLOPs per image"}

DIGIT = 11
"""Width in pixels of a digit of a label."""


def write_png(figure: Figure, path: Path) -> Path:
    """Save by renaming, so that whoever looks never sees half a picture; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, format="png", dpi=DPI)
    fresh.replace(path)
    return path


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, bound to Agg whatever backend the process has chosen."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def figure_of_panels(
    compared: str, height: float, top: float, bottom: float
) -> tuple[Figure, dict[str, Axes]]:
    """An empty figure with the panels of `PANELS[compared]`, by score: two side by side or one, with titles and label.

    height: in inches. top, bottom: edges of the panels, as shares of it.
    """
    titles = PANELS[compared]
    width, left = (9.6, 0.07) if len(titles) > 1 else (6.4, 0.115)
    figure = figure_of(width, height)
    figure.subplots_adjust(left=left, right=0.985, top=top, bottom=bottom, wspace=0.13)
    panels = dict(zip(titles, figure.subplots(1, len(titles), squeeze=False)[0], strict=True))
    for key, axes in panels.items():
        axes.set_title(titles[key], fontsize=10, pad=8)
        axes.set_axisbelow(True)
    panels[compared].set_ylabel(WORTH[compared])
    return figure, panels


def scale_of(score: str) -> float:
    """By what a score is multiplied to be shown: accuracies in per cent, RankMe as it is."""
    return 1.0 if score == "rankme" else 100.0


def score_axis(axes: Axes, score: str) -> None:
    """Plain numbers; an accuracy does not go beyond 100 %."""
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    if score != "rankme":
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.0))


def cost_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the costs differ more than tenfold; plain numbers either way."""
    if max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _depth_axis(figure: Figure, axes: Axes, x: Mapping[int, float]) -> None:
    """Name the depths along the upper edge, once for all series; those too close for a label each share one.

    Labels beside the points would have to dodge error bars and lines of three series.
    """
    figure.draw_without_rendering()  # settles the limits, which decide what is close
    pixels = axes.transData.transform([(place, 0.0) for place in x.values()])[:, 0]
    labels: list[tuple[list[float], str]] = []
    for pixel, depth in sorted(zip(pixels.tolist(), x, strict=True)):
        labels.append(([pixel], str(depth)))
        while len(labels) > 1 and _touch(labels[-2], labels[-1]):
            (right, last), (left, first) = labels.pop(), labels.pop()
            labels.append((left + right, f"{first}, {last}"))
    places = axes.transData.inverted().transform([(float(np.mean(group)), 0.0) for group, _ in labels])[:, 0]
    upper = axes.secondary_xaxis("top")
    upper.set_ticks(places.tolist(), [text for _, text in labels], fontsize=8)
    upper.minorticks_off()
    axes.annotate(
        "layers", (0, 1), (-6, 7.5), "axes fraction", "offset points", fontsize=8, ha="right", va="baseline"
    )
    for place in x.values():
        axes.axvline(place, color="0.9", linewidth=0.8, zorder=0)


def _touch(left: tuple[list[float], str], right: tuple[list[float], str]) -> bool:
    """Whether two labels, each centred on its pixels, are nearer than a digit of each other."""
    distance = float(np.mean(right[0]) - np.mean(left[0]))
    return distance < DIGIT * (len(left[1]) + len(right[1]) + 2) / 2
