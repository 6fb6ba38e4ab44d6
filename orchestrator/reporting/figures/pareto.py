"""Trials of a search: metric against training cost, with the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bim.orchestrator.search.results import SearchResult
from bim.orchestrator.reporting.figures.style import figure_of, scale_of

TRIALS = {"finished": "#0072B2", "stopped early": "#D55E00"}


def pareto_figure(result: SearchResult, metric: str) -> Figure | None:
    """Score of every trial against what a training image costs it; the front is joined, trial 0 and the best are named.

    metric: the score in words. None if no trial was scored. Scores of trials that were stopped early are of fewer epochs:
    such points are hollow and never on the front.
    """
    shown = [row for row in result.rows if row.score is not None and row.gflops is not None]
    if not shown:
        return None
    figure = figure_of(7.2, 4.6)
    figure.subplots_adjust(left=0.11, right=0.975, top=0.87, bottom=0.125)
    axes = figure.subplots()
    per_cent = scale_of(result.metric)
    front = [(row.gflops, per_cent * (row.score or 0.0)) for row in result.pareto_front]
    if front:
        axes.plot(
            *zip(*front, strict=True),
            color=TRIALS["finished"],
            linewidth=1.3,
            drawstyle="steps-post",
            zorder=1,
        )
    for status, color in TRIALS.items():
        rows = [row for row in shown if (row.status == "finished") == (status == "finished")]
        if rows:
            axes.scatter(
                [row.gflops or 0.0 for row in rows],
                [per_cent * (row.score or 0.0) for row in rows],
                s=[70 if row.number == 0 else 38 for row in rows],
                facecolors=color if status == "finished" else "none",
                edgecolors=color,
                label=f"{status} ({len(rows)})",
                zorder=2,
            )
    best = result.best.number if front else None
    costs = [row.gflops or 0.0 for row in shown]
    names: dict[tuple[float | None, float | None], list[str]] = {}
    for row in shown:
        words = (
            f"trial {row.number}" + ", the recipe's own" * (row.number == 0) + ", best" * (row.number == best)
        )
        names.setdefault((row.gflops, row.score), []).append(words)
    for (cost, score), labels in names.items():
        place = (cost or 0.0, per_cent * (score or 0.0))
        right = place[0] > (min(costs) + max(costs)) / 2
        axes.annotate(
            "; ".join(labels),
            place,
            (-6 if right else 6, 5),
            textcoords="offset points",
            fontsize=8,
            ha="right" if right else "left",
        )
    axes.set_xlabel("forward GFLOPs per training image, mean over the epochs")
    axes.set_ylabel(f"{metric}, mean of all depths" + ", %" * (per_cent > 1))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.14, 0.12)
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    return figure
