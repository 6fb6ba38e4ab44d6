"""Accuracy of every depth against latency, parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bim.orchestrator.evaluation.records import DepthReport
from bim.orchestrator.reporting.figures.style import (
    COSTS,
    PANELS,
    RAW_COLOR,
    SERIES,
    _depth_axis,
    cost_axis,
    figure_of_panels,
    scale_of,
    score_axis,
)


def accuracy_latency_figure(
    reports: Sequence[DepthReport],
    random_reports: Sequence[DepthReport] = (),
    raw: Mapping[str, float] | None = None,
    baseline_reports: Sequence[DepthReport] = (),
) -> Figure | None:
    """Accuracy of every depth against its latency, nearest neighbours left, linear probe right.

    Without labels one panel of RankMe; None if that was not measured either. Bars are one standard error. All series of
    one depth stand at the latency measured for the trained variant, since they are the same network. Where no latency was
    measured the arithmetic per image takes its place.
    raw: accuracies of raw pixels by the names of `Scores.metrics`.
    """
    costs = {report.depth: report.metrics() for report in reports}
    compared = next((score for score in PANELS if all(score in cost for cost in costs.values())), None)
    if not reports or compared is None:
        return None
    by = "latency_b1_ms" if all("latency_b1_ms" in cost for cost in costs.values()) else "gflops"
    x = {depth: cost[by] for depth, cost in costs.items()}
    series = dict(zip(SERIES, (reports, baseline_reports, random_reports), strict=True))
    figure, panels = figure_of_panels(compared, 4.6, top=0.815, bottom=0.14)
    for key, axes in panels.items():
        for name, group in series.items():
            shown = sorted((report for report in group if report.depth in x), key=lambda report: report.depth)
            if not shown:
                continue
            found = [report.metrics() for report in shown]
            axes.errorbar(
                [x[report.depth] for report in shown],
                [scale_of(key) * values[key] for values in found],
                yerr=None if key == "rankme" else [100 * values[f"{key}_se"] for values in found],
                label=name,
                capsize=2.5,
                markersize=5,
                linewidth=1.3,
                elinewidth=1.0,
                **SERIES[name],
            )
        if raw and key in raw:
            axes.axhline(100 * raw[key], color=RAW_COLOR, linestyle=":", linewidth=1.5, label="raw pixels")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.margins(x=0.06, y=0.08)
        score_axis(axes, key)
        cost_axis(axes, list(x.values()))
        _depth_axis(figure, axes, x)
    drawn = dict(zip(*reversed(panels[compared].get_legend_handles_labels()), strict=True))
    names = [name for name in (*SERIES, "raw pixels") if name in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="upper center", ncols=4, frameon=False, fontsize=9)
    device = next((report.device for report in reports if report.device), "")
    measured_on = f" ({device})" if device and by == "latency_b1_ms" else ""
    figure.supxlabel(COSTS[by] + measured_on, fontsize=10, y=0.02)
    return figure
