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
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from orchestrator.evaluation import DepthReport
    from orchestrator.search_results import SearchResult

DPI = 150
GREY = 0.5
"""What stands for a masked unit: neither the black ground of scans nor the white of drawings."""

CELL = 190
"""Least side in pixels at which an image is shown."""

GAP, HEAD, TITLE = 8, 26, 34
"""Pixels between images, for column heads, and for the title."""

SERIES: dict[str, dict[str, Any]] = {
    "trained": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "MAE cut to the depth": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "random initialisation": {"color": "#7F7F7F", "marker": "^", "linestyle": "-."},
}
RAW_COLOR = "#009E73"
TRIALS = {"finished": "#0072B2", "stopped early": "#D55E00"}
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


def hide_masked(images: np.ndarray, masked: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Grey where masked. images: (B, H, W, 3) in 0..1; masked: (B, M) mask units, row by row over `grid`."""
    return np.where(_is_masked(masked, grid, images.shape[1:3]), GREY, images)


def hide_visible(images: np.ndarray, masked: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Grey where not masked; shapes as in `hide_masked`."""
    return np.where(_is_masked(masked, grid, images.shape[1:3]), images, GREY)


def fill_masked(
    images: np.ndarray, predicted: np.ndarray, masked: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """`predicted` where masked, `images` elsewhere; shapes as in `hide_masked`."""
    return np.where(_is_masked(masked, grid, images.shape[1:3]), predicted, images)


def reconstruction_figure(
    original: np.ndarray,
    predicted: np.ndarray,
    masked: np.ndarray,
    grid: tuple[int, int],
    title: str = "",
    wanted: np.ndarray | None = None,
    thrown: np.ndarray | None = None,
) -> Figure:
    """One row per image: masked | reconstructed | original. The visible part is shown as it is, not as it was predicted.

    original, predicted: (B, H, W, 3), un-normalised; what lies outside 0..1 is clipped. masked: (B, M) tokens that are
    predicted; thrown: (B, T) those that are masked too and of which nothing is predicted: they stay grey.
    wanted: where no pixels are predicted, a picture of the true target: masked | predicted | target | original.
    """
    seen = original if thrown is None or not thrown.size else hide_masked(original, thrown, grid)
    columns = {"masked": hide_masked(seen, masked, grid)}
    if wanted is None:
        columns["reconstructed"] = fill_masked(seen, predicted, masked, grid)
    else:
        columns |= {"predicted": hide_visible(predicted, masked, grid), "target": wanted}
    columns["original"] = original
    scale = max(1, -(-CELL // max(original.shape[1:3])))  # whole pixels, or patches would differ in size
    sheets = [np.clip(shown, 0, 1).repeat(scale, axis=1).repeat(scale, axis=2) for shown in columns.values()]
    rows, height, width = sheets[0].shape[:3]
    sheet_height = rows * (height + GAP) - GAP
    canvas = np.ones((sheet_height, len(columns) * (width + GAP) - GAP, 3))
    for column, shown in enumerate(sheets):
        for row, image in enumerate(shown):
            top, left = row * (height + GAP), column * (width + GAP)
            canvas[top : top + height, left : left + width] = image

    margin = GAP * 2
    total_width = canvas.shape[1] + 2 * margin
    total_height = sheet_height + 2 * margin + HEAD + (TITLE if title else 0)
    figure = figure_of(total_width / DPI, total_height / DPI)
    place = (
        margin / total_width,
        margin / total_height,
        canvas.shape[1] / total_width,
        sheet_height / total_height,
    )
    axes = figure.add_axes(place)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    head = (margin + sheet_height + HEAD / 3) / total_height
    for column, name in enumerate(columns):
        centre = (margin + column * (width + GAP) + width / 2) / total_width
        figure.text(centre, head, name, ha="center", va="bottom", fontsize=8)
    if title:
        figure.text(0.5, 1 - margin / 2 / total_height, title, ha="center", va="top", fontsize=9)
    return figure


def save_reconstructions(
    path: Path,
    original: np.ndarray,
    predicted: np.ndarray,
    masked: np.ndarray,
    grid: tuple[int, int],
    title: str = "",
    wanted: np.ndarray | None = None,
    thrown: np.ndarray | None = None,
) -> Path:
    """`reconstruction_figure` as a PNG file."""
    return write_png(reconstruction_figure(original, predicted, masked, grid, title, wanted, thrown), path)


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


def loss_curves_figure(curves: Mapping[int, Sequence[tuple[int, float]]]) -> Figure:
    """The loss of each block over optimizer steps: as measured (faint) and as a running mean (bold).

    curves: block -> (step, loss) in order; values that are not finite leave a hole. The axis fits the running means, so that
    one outlier does not flatten the rest.
    """
    figure = figure_of(7.2, 4.0)
    figure.subplots_adjust(left=0.09, right=0.975, top=0.93, bottom=0.125)
    axes = figure.subplots()
    low, high = [], []
    for place, (block, points) in enumerate(sorted(curves.items())):
        if not points:
            continue
        steps, losses = np.array(points, dtype=float).T
        color = colormaps["viridis"](0.9 * place / max(1, len(curves) - 1))
        smooth = _running_mean(losses, max(1, len(losses) // 50))
        if len(losses) >= 100:
            axes.plot(steps, losses, color=color, linewidth=0.6, alpha=0.25)
        axes.plot(steps, smooth, color=color, linewidth=1.6, label=f"block {block}")
        low.append(np.nanmin(smooth, initial=np.inf))
        high.append(np.nanmax(smooth, initial=-np.inf))
    if low and np.isfinite([min(low), max(high)]).all():
        margin = 0.06 * (max(high) - min(low)) or 0.05
        axes.set_ylim(min(low) - margin, max(high) + margin)
        axes.legend(frameon=False, fontsize=9, ncols=1 + len(curves) // 7)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reconstruction loss of the block")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    return figure


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
    front = [(row.gflops, per_cent * (row.score or 0.0)) for row in result.front]
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


def _is_masked(masked: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """masked: (B, M) units -> (B, H, W, 1), True in every pixel of a masked unit."""
    units = np.zeros((len(masked), grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(units, masked, True, axis=1)
    pixels = units.reshape(len(masked), *grid)
    return pixels.repeat(size[0] // grid[0], axis=1).repeat(size[1] // grid[1], axis=2)[..., None]


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window that shrinks at both ends; what is not finite does not count. (n,) -> (n,)"""
    known = np.isfinite(values)
    window = np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


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
