"""Trials of a search: quality against training cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from bim.orchestrator.evaluation.metric_info import METRICS
from bim.orchestrator.reporting.figures.style import BLUE, GRAY, GREEN, ORANGE, PINK, YELLOW, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bim.orchestrator.search.results import SearchResult, Status, TrialRow

STATUS_COLORS: dict[Status, str] = {
    "finished": BLUE,
    "stopped early": ORANGE,
    "infeasible": YELLOW,
    "failed": GRAY,
    "running": GREEN,
    "waiting": PINK,
}


def pareto_figure(result: SearchResult) -> Figure | None:
    """Metric of every trial against what a training image costs it, the front joined, every trial named.

    None if no trial has a metric. Trials that did not finish were trained for fewer epochs: such points are hollow, in the
    color of their status, named with their epochs, and never on the front. Bars are one standard error of an accuracy.
    """
    rows = [row for row in result.rows if row.score is not None and row.gflops is not None]
    if not rows:
        return None
    metric = METRICS[result.metric]
    points = {row.number: (row.gflops or 0.0, metric.scale * (row.score or 0.0)) for row in rows}
    figure = new_figure(7.2, 4.6)
    figure.subplots_adjust(left=0.11, right=0.975, top=0.87, bottom=0.125)
    axes = figure.subplots()
    optimal = [points[row.number] for row in result.pareto_front]
    if optimal:
        axes.plot(*zip(*optimal, strict=True), color=BLUE, linewidth=1.3, drawstyle="steps-post", zorder=1)
    for status, color in STATUS_COLORS.items():
        group = [row for row in rows if row.status == status]
        if group:
            axes.scatter(
                x=[points[row.number][0] for row in group],
                y=[points[row.number][1] for row in group],
                s=[70 if row.number == 0 else 38 for row in group],
                facecolors=color if status == "finished" else "none",
                edgecolors=color,
                label=f"{status} ({len(group)})",
                zorder=2,
            )
    errors = {row.number: result.error_of(row.score or 0.0) for row in rows}
    for row in rows:
        x, y = points[row.number]
        if (error := errors[row.number]) is not None:
            axes.errorbar(
                x,
                y,
                metric.scale * error,
                color=STATUS_COLORS[row.status],
                elinewidth=0.9,
                zorder=1,
            )
    _name_trials(axes, rows, points, result.best.number if optimal else None, result.epochs)
    axes.set_xlabel("forward GFLOPs per training image, mean over the epochs")
    axes.set_ylabel(f"{metric.name}, mean of all depths" + ", %" * metric.percent)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.14, 0.12)
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _name_trials(
    axes: Axes,
    rows: Sequence[TrialRow],
    points: dict[int, tuple[float, float]],
    best: int | None,
    epochs: int,
) -> None:
    """Label the points toward the middle of the axes; trials at the same point share a label. epochs: of a whole trial."""
    names: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        name = (
            f"trial {row.number}"
            + ", baseline config" * (row.number == 0)
            + ", best" * (row.number == best)
            + f", {row.epoch} of {epochs} epochs" * (row.epoch < epochs)
        )
        names.setdefault(points[row.number], []).append(name)
    costs = [x for x, _ in points.values()]
    for point, labels in names.items():
        in_right_half = point[0] > (min(costs) + max(costs)) / 2
        axes.annotate(
            "; ".join(labels),
            point,
            (-6 if in_right_half else 6, 5),
            textcoords="offset points",
            fontsize=8,
            ha="right" if in_right_half else "left",
        )
