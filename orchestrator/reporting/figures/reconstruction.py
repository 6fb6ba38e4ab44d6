"""Reconstruction grids: test images masked, predicted, and as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    pass
from bim.orchestrator.reporting.figures.style import DPI, GREY, figure_of, write_png

CELL = 190
"""Least side in pixels at which an image is shown."""

GAP, HEAD, TITLE = 8, 26, 34
"""Pixels between images, for column heads, and for the title."""


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


def _is_masked(masked: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """masked: (B, M) units -> (B, H, W, 1), True in every pixel of a masked unit."""
    units = np.zeros((len(masked), grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(units, masked, True, axis=1)
    pixels = units.reshape(len(masked), *grid)
    return pixels.repeat(size[0] // grid[0], axis=1).repeat(size[1] // grid[1], axis=2)[..., None]
