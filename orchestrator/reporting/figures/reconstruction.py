"""Reconstructions: test images masked, predicted, and original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from bim.orchestrator.reporting.figures.style import DPI, new_figure

GRAY = 0.5
"""Value of masked pixels: neither the black background of scans nor the white of drawings."""

MIN_IMAGE_PX = 190
"""Smallest side at which an image is shown."""

GAP_PX, HEADING_PX, TITLE_PX = 8, 26, 34
"""Space between images, for the headings of columns, and for the title."""


@dataclass(frozen=True)
class Reconstructions:
    """Images and what a decoder predicts of them.

    Args:
        original, predicted: (B, H, W, 3), not normalized; values outside 0..1 are clipped.
        masked: (B, M) indices of tokens that are predicted.
        grid: (rows, columns) of tokens.
        target: (B, H, W, 3), an image of the true target if it is not pixels.
        thrown: (B, T) indices of masked tokens that are not predicted; they stay gray.
    """

    original: np.ndarray
    predicted: np.ndarray
    masked: np.ndarray
    grid: tuple[int, int]
    target: np.ndarray | None = None
    thrown: np.ndarray | None = None


def reconstruction_figure(images: Reconstructions, title: str = "") -> Figure:
    """One row per image: masked | reconstructed | original. Visible patches are those of the image, not predictions.

    Of a target that is not pixels: masked | predicted | target | original.
    """
    masked, reconstructed = _columns(images)
    columns = [("masked", masked)]
    if images.target is None:
        columns.append(("reconstructed", reconstructed))
    else:
        columns += [("predicted", reconstructed), ("target", images.target)]
    return _figure([*columns, ("original", images.original)], title)


def reconstruction_grid(by_depth: Mapping[int, Reconstructions], title: str = "") -> Figure:
    """One row per image, a column for what every depth predicts: original | masked | depth 3 | depth 6 | ...

    Where deeper blocks see fewer patches, each mask stands before the depths that have it.

    Args:
        by_depth: layers -> of the same images.
    """
    first = by_depth[min(by_depth)]
    columns = [("original", first.original)]
    if first.target is not None:
        columns.append(("target", first.target))
    previous: np.ndarray | None = None
    for depth, images in sorted(by_depth.items()):
        masked, reconstructed = _columns(images)
        if previous is None or not np.array_equal(masked, previous):
            hidden = images.masked.shape[1] + (0 if images.thrown is None else images.thrown.shape[1])
            columns.append((f"masked {hidden / math.prod(images.grid):.0%}", masked))
        previous = masked
        columns.append((f"depth {depth}", reconstructed))
    return _figure(columns, title)


def _columns(images: Reconstructions) -> tuple[np.ndarray, np.ndarray]:
    """The masked images, and what is predicted among what is visible, or on gray if the target is not pixels."""
    original, grid = images.original, images.grid
    visible, size = original, original.shape[1:3]
    if images.thrown is not None:
        visible = np.where(_is_masked(images.thrown, grid, size), GRAY, original)
    is_masked = _is_masked(images.masked, grid, size)
    around = visible if images.target is None else GRAY
    return np.where(is_masked, GRAY, visible), np.where(is_masked, images.predicted, around)


def _figure(columns: Sequence[tuple[str, np.ndarray]], title: str) -> Figure:
    """Columns of images (B, H, W, 3) under their names, a row for every image."""
    size = columns[0][1].shape[1:3]
    # Whole pixels, or patches would differ in size.
    scale = max(1, -(-MIN_IMAGE_PX // max(size)))
    canvas, width = _tile([np.clip(images, 0, 1) for _, images in columns], scale)

    margin = GAP_PX * 2
    lines = title.count("\n") + 1
    total_width = canvas.shape[1] + 2 * margin
    total_height = canvas.shape[0] + 2 * margin + HEADING_PX + (lines * TITLE_PX if title else 0)
    figure = new_figure(total_width / DPI, total_height / DPI)
    left, bottom = margin / total_width, margin / total_height
    axes = figure.add_axes((left, bottom, canvas.shape[1] / total_width, canvas.shape[0] / total_height))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    heading = (margin + canvas.shape[0] + HEADING_PX / 3) / total_height
    for column, (name, _) in enumerate(columns):
        center = (margin + column * (width + GAP_PX) + width / 2) / total_width
        figure.text(center, heading, name, ha="center", va="bottom", fontsize=8)
    if title:
        figure.text(0.5, 1 - margin / 2 / total_height, title, ha="center", va="top", fontsize=9)
    return figure


def _tile(columns: list[np.ndarray], scale: int) -> tuple[np.ndarray, int]:
    """Columns of images (B, H, W, 3) on one white canvas, enlarged `scale` times, and the width of a column in pixels."""
    rows, height, width = columns[0].shape[0], scale * columns[0].shape[1], scale * columns[0].shape[2]
    canvas = np.ones((rows * (height + GAP_PX) - GAP_PX, len(columns) * (width + GAP_PX) - GAP_PX, 3))
    for column, images in enumerate(columns):
        for row, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
            top, left = row * (height + GAP_PX), column * (width + GAP_PX)
            canvas[top : top + height, left : left + width] = image
    return canvas, width


def _is_masked(masked: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """masked: (B, M) units -> (B, H, W, 1), True in every pixel of a masked unit."""
    units = np.zeros((len(masked), grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(units, masked, True, axis=1)
    pixels = units.reshape(len(masked), *grid)
    return pixels.repeat(size[0] // grid[0], axis=1).repeat(size[1] // grid[1], axis=2)[..., None]
