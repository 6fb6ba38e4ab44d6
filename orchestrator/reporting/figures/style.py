"""What the figures share: size, colors, file format, and panels of a quality metric against a cost.

Matplotlib figures on the Agg canvas, without pyplot: no global state, no display, safe beside training threads. Colors are
Okabe and Ito's, which color-blind readers can tell apart, and every series has a marker of its own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bim.orchestrator.evaluation.metric_info import METRICS, same_scale
from bim.orchestrator.files import atomic_write, make_folder
from bim.orchestrator.text import redact

DPI = 150

MAX_NAME = 36
"""Characters of the name of a run, and of its data, in a title."""

TITLE_IN = 0.3
"""Height of a title, in inches."""

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
YELLOW, PINK = "#E69F00", "#CC79A7"


def write_png(figure: Figure, path: Path) -> Path:
    """Save a figure; its folder is made, in one that exists. Raises StorageError."""
    make_folder(path.parent)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    atomic_write(path, png.getvalue())
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, bound to Agg whatever backend the process has chosen."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def data_name(source: str) -> str:
    """A source as titles name it: without credentials, of a path the last two parts, at most `MAX_NAME` characters."""
    parts = [part for part in redact(source).rstrip("/").split("/") if part]
    name = "/".join(parts[-2:]) or source
    return name if len(name) <= MAX_NAME else f"...{name[3 - MAX_NAME :]}"


def picture_title(run: str, source: str, images: str) -> str:
    """`demo, digits, n = 359 test images`. images: how many a score is counted on, and of which split."""
    name = run if len(run) <= MAX_NAME else f"...{run[3 - MAX_NAME :]}"
    return f"{name}, {data_name(source)}, n = {images}"


def add_title(figure: Figure, title: str) -> None:
    """A line above all else, in space that is added to the figure; nothing for an empty one."""
    if not title:
        return
    height = figure.get_figheight()
    total = height + TITLE_IN
    fraction, edges = height / total, figure.subplotpars
    figure.set_figheight(total)
    figure.subplots_adjust(top=edges.top * fraction, bottom=edges.bottom * fraction)
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0, 0, 1, fraction), transform=figure.transFigure)
    figure.text(0.5, 1 - 0.08 / total, title, ha="center", va="top", fontsize=10)


def metric_panels(metric: str, height: float, top: float, bottom: float) -> tuple[Figure, dict[str, Axes]]:
    """An empty figure with one panel for every metric on the scale of `metric`, by key, with titles and label.

    Args:
        height: in inches.
        top, bottom: edges of the panels, as fractions of it.
    """
    infos = same_scale(metric)
    width, left = (9.6, 0.07) if len(infos) > 1 else (6.4, 0.115)
    figure = new_figure(width, height)
    figure.subplots_adjust(left=left, right=0.985, top=top, bottom=bottom, wspace=0.13)
    axes = figure.subplots(1, len(infos), squeeze=False)[0]
    for panel, info in zip(axes, infos, strict=True):
        panel.set_title(info.title, fontsize=10, pad=8)
        panel.set_axisbelow(True)
    axes[0].set_ylabel(METRICS[metric].axis)
    return figure, {info.key: panel for info, panel in zip(infos, axes, strict=True)}


def draw_series(
    axes: Axes, metric: str, x: Sequence[float], values: Sequence[Mapping[str, Any]], **style: Any
) -> None:
    """A line through the values of `metric` with bars of one standard error, where all of them have one.

    Args:
        values: one for each x, with the keys `metric` and, where it is known, `{metric}_se`.
        style: arguments of matplotlib, "label" among them.
    """
    scale, errors = METRICS[metric].scale, [row.get(f"{metric}_se") for row in values]
    axes.errorbar(
        x,
        [scale * row[metric] for row in values],
        yerr=None if None in errors else [scale * error for error in errors if error is not None],
        capsize=2.5,
        markersize=5,
        linewidth=1.3,
        elinewidth=1.0,
        **style,
    )


def metric_axis(axes: Axes, metric: str) -> None:
    """Plain numbers; a percentage does not go beyond 100."""
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    if METRICS[metric].percent:
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.0))


def cost_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic if the costs differ more than tenfold; plain numbers either way."""
    if max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label_cost(figure: Figure, cost: str, device: str) -> None:
    """Name the cost under all panels. cost: key of the metric; device: where latencies were measured, if known."""
    measured_on = f" ({device})" if device and cost == "latency_b1_ms" else ""
    figure.supxlabel(METRICS[cost].axis + measured_on, fontsize=10, y=0.02)


def legend_above(figure: Figure, axes: Axes, names: Sequence[str], columns: int) -> None:
    """One legend above all panels, with those of `names` that were drawn in `axes`, in their order."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn = [name for name in names if name in handles]
    figure.legend(
        [handles[name] for name in drawn],
        drawn,
        loc="upper center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
