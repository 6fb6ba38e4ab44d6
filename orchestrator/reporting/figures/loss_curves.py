"""The loss of every block over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from bim.orchestrator.reporting.figures.style import new_figure


def loss_curves_figure(curves: Mapping[int, Sequence[tuple[int, float]]]) -> Figure:
    """The loss of each block over optimizer steps: as measured (faint) and as a running mean (bold).

    curves: block -> (step, loss) in order; values that are not finite leave a gap. The axis fits the running means, so that
    one outlier does not flatten the rest.
    """
    figure = new_figure(7.2, 4.0)
    figure.subplots_adjust(left=0.09, right=0.975, top=0.93, bottom=0.125)
    axes = figure.subplots()
    low, high = [], []
    for index, (block, points) in enumerate(sorted(curves.items())):
        if not points:
            continue
        steps, losses = np.array(points, dtype=float).T
        color = colormaps["viridis"](0.9 * index / max(1, len(curves) - 1))
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


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centered window that shrinks at both ends; values that are not finite do not count. (n,) -> (n,)"""
    known = np.isfinite(values)
    window = np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.where(known, total / np.maximum(count, 1.0), np.nan)
