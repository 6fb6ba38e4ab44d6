"""The picture of a run with several backbones: worth of every depth against its cost, one series for each backbone.

A Matplotlib figure without global state, as those of `pictures.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bim.orchestrator.reporting.comparison import cost_of, front, score_of
from bim.orchestrator.reporting.figures.style import (
    COSTS,
    PANELS,
    cost_axis,
    figure_of_panels,
    scale_of,
    score_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bim.orchestrator.reporting.comparison import MemberResult

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def comparison_figure(results: Sequence[MemberResult], device: str = "") -> Figure | None:
    """Nearest neighbours left, linear probe right; numbers at the points are depths. Without labels one panel of RankMe.

    None if no backbone has a score. Bars are one standard error. The dashed steps are the front: what lies on them is not
    beaten by anything as cheap.
    device: what the latencies were measured on.
    """
    compared = score_of(results)
    shown = [
        result
        for result in results
        if result.trained and all(row.get(compared or "") is not None for row in result.trained)
    ]
    if compared is None or not shown:
        return None
    cost = cost_of(shown)
    columns = 1 + len(PANELS[compared])
    lines = -(-len(shown) // columns)
    figure, panels = figure_of_panels(compared, 5.0, top=0.89 - 0.05 * lines, bottom=0.13)
    for key, axes in panels.items():
        at: dict[tuple[str, object], tuple[float, float]] = {}
        for number, result in enumerate(shown):
            x = [float(row[cost] or 0.0) for row in result.trained]
            y = [scale_of(key) * float(row[key] or 0.0) for row in result.trained]
            errors = [100 * float(row.get(f"{key}_se") or 0.0) for row in result.trained]
            axes.errorbar(
                x,
                y,
                yerr=None if key == "rankme" else errors,
                label=result.name,
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                capsize=2.5,
                markersize=5,
                linewidth=1.3,
                elinewidth=1.0,
            )
            for row, place in zip(result.trained, zip(x, y, strict=True), strict=True):
                at[result.name, row["depth"]] = place
                axes.annotate(str(row["depth"]), place, (5, -9), textcoords="offset points", fontsize=7)
        steps = [at[point] for point in front(shown, key)]
        steps.append((max(x for x, _ in at.values()), steps[-1][1]))
        axes.plot(
            *zip(*steps, strict=True),
            color="0.55",
            linestyle="--",
            drawstyle="steps-post",
            zorder=0,
            label="front",
        )
        axes.grid(color="0.93", linewidth=0.8)
        axes.margins(x=0.08, y=0.1)
        score_axis(axes, key)
        cost_axis(axes, [place[0] for place in at.values()])
    handles, names = panels[compared].get_legend_handles_labels()
    drawn = dict(zip(names, handles, strict=True))
    order = [*(result.name for result in shown), "front"]
    figure.legend(
        [drawn[name] for name in order], order, loc="upper center", ncols=columns, frameon=False, fontsize=9
    )
    on = f" ({device})" if device and cost == "latency_b1_ms" else ""
    figure.supxlabel(COSTS[cost] + on, fontsize=10, y=0.02)
    return figure
