"""Accuracy, or RankMe without labels, of every depth against its latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bim.orchestrator.evaluation.metric_info import METRICS, RANKED_BY
from bim.orchestrator.reporting.figures.style import (
    BLUE,
    GRAY,
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
    from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult

SERIES: dict[str, dict[str, Any]] = {
    "trained": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "MAE cut to the depth": {"color": ORANGE, "marker": "s", "linestyle": "--"},
    "random initialization": {"color": GRAY, "marker": "^", "linestyle": "-."},
}

DIGIT_PX = 11
"""Width of a digit of a label, in pixels."""


def accuracy_latency_figure(
    evaluation: EvaluationResult, baseline: Sequence[DepthReport] = ()
) -> Figure | None:
    """Accuracy of every depth against its latency, nearest neighbors left, linear probe right.

    Without labels one panel of RankMe; None if that was not measured either. Bars are one standard error. All series of
    one depth have the x of the trained variant, since they are the same network. If not all latencies were measured,
    GFLOPs per image replace them.
    baseline: the depths of the baseline, if there was one.
    """
    reports, raw = evaluation.reports, evaluation.raw
    costs = {report.depth: report.metrics() for report in reports}
    metric = next((key for key in RANKED_BY if all(key in cost for cost in costs.values())), None)
    if not reports or metric is None:
        return None
    cost = "latency_b1_ms" if all("latency_b1_ms" in cost for cost in costs.values()) else "gflops"
    x = {depth: values[cost] for depth, values in costs.items()}
    figure, panels = metric_panels(metric, 4.6, top=0.815, bottom=0.14)
    for key, axes in panels.items():
        for name, group in zip(SERIES, (reports, baseline, evaluation.random), strict=True):
            points = sorted((report.depth, report.metrics()) for report in group if report.depth in x)
            if points:
                depths, values = zip(*points, strict=True)
                draw_series(axes, key, [x[depth] for depth in depths], values, label=name, **SERIES[name])
        if key in raw:
            height = METRICS[key].scale * raw[key]
            axes.axhline(height, color=GREEN, linestyle=":", linewidth=1.5, label="raw pixels")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.margins(x=0.06, y=0.08)
        metric_axis(axes, key)
        cost_axis(axes, list(x.values()))
        _depth_axis(figure, axes, x)
    legend_above(figure, panels[metric], [*SERIES, "raw pixels"], columns=4)
    label_cost(figure, cost, next((report.device for report in reports if report.device), ""))
    return figure


def _depth_axis(figure: Figure, axes: Axes, x: Mapping[int, float]) -> None:
    """Name the depths along the upper edge, once for all series; depths too close for a label each share one.

    Labels beside the points would collide with error bars and lines of three series.
    """
    figure.draw_without_rendering()  # fixes the limits of the axes, on which distances in pixels depend
    pixels = axes.transData.transform([(value, 0.0) for value in x.values()])[:, 0]
    labels: list[tuple[list[float], str]] = []
    for pixel, depth in sorted(zip(pixels.tolist(), x, strict=True)):
        labels.append(([pixel], str(depth)))
        while len(labels) > 1 and _overlap(labels[-2], labels[-1]):
            (right, last), (left, first) = labels.pop(), labels.pop()
            labels.append((left + right, f"{first}, {last}"))
    centers = [(float(np.mean(group)), 0.0) for group, _ in labels]
    upper = axes.secondary_xaxis("top")
    upper.set_ticks(
        axes.transData.inverted().transform(centers)[:, 0].tolist(), [text for _, text in labels], fontsize=8
    )
    upper.minorticks_off()
    axes.annotate(
        "layers", (0, 1), (-6, 7.5), "axes fraction", "offset points", fontsize=8, ha="right", va="baseline"
    )
    for value in x.values():
        axes.axvline(value, color="0.9", linewidth=0.8, zorder=0)


def _overlap(left: tuple[list[float], str], right: tuple[list[float], str]) -> bool:
    """Whether two labels, each centered on the mean of its pixels, are less than a digit apart."""
    distance = float(np.mean(right[0]) - np.mean(left[0]))
    return distance < DIGIT_PX * (len(left[1]) + len(right[1]) + 2) / 2
