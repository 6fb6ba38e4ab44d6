"""Several backbones: quality of every depth against its cost, one series for each backbone, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bim.orchestrator.evaluation.metric_info import METRICS
from bim.orchestrator.reporting.comparison import cost_key, pareto_depths, quality_key
from bim.orchestrator.reporting.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    cost_axis,
    draw_series,
    label_cost,
    legend_above,
    metric_axis,
    metric_panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bim.orchestrator.reporting.comparison import MemberResult

COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

Points = dict[tuple[str, object], tuple[float, float]]
"""(name, depth) -> (x, y) of a variant."""


def comparison_figure(results: Sequence[MemberResult], device: str = "") -> Figure | None:
    """Nearest neighbors left, linear probe right; numbers at the points are depths. Without labels one panel of RankMe.

    None if no backbone was evaluated. Bars are one standard error. The dashed steps are the Pareto front.
    device: where the latencies were measured.
    """
    metric = quality_key(results)
    measured = [
        result
        for result in results
        if result.trained and all(row.get(metric or "") is not None for row in result.trained)
    ]
    if metric is None or not measured:
        return None
    cost, columns = cost_key(measured), 3 if METRICS[metric].percent else 2
    legend_rows = -(-len(measured) // columns)
    figure, panels = metric_panels(metric, 5.0, top=0.89 - 0.05 * legend_rows, bottom=0.13)
    for key, axes in panels.items():
        points: Points = {}
        for index, result in enumerate(measured):
            points |= _draw_backbone(axes, result, key, cost, index)
        optimal = [points[variant] for variant in pareto_depths(measured, key)]
        optimal.append((max(x for x, _ in points.values()), optimal[-1][1]))
        axes.plot(
            *zip(*optimal, strict=True),
            color="0.55",
            linestyle="--",
            drawstyle="steps-post",
            zorder=0,
            label="Pareto front",
        )
        axes.grid(color="0.93", linewidth=0.8)
        axes.margins(x=0.08, y=0.1)
        metric_axis(axes, key)
        cost_axis(axes, [x for x, _ in points.values()])
    legend_above(figure, panels[metric], [*(result.name for result in measured), "Pareto front"], columns)
    label_cost(figure, cost, device)
    return figure


def _draw_backbone(axes: Axes, result: MemberResult, metric: str, cost: str, index: int) -> Points:
    scale, rows = METRICS[metric].scale, result.trained
    x = [float(row[cost] or 0.0) for row in rows]
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    draw_series(axes, metric, x, rows, label=result.name, color=color, marker=marker)
    points: Points = {}
    for row, cost_value in zip(rows, x, strict=True):
        points[result.name, row["depth"]] = point = (cost_value, scale * float(row[metric] or 0.0))
        axes.annotate(str(row["depth"]), point, (5, -9), textcoords="offset points", fontsize=7)
    return points
