"""Figures of many small images in rows and columns, each pixel of an image a whole number of pixels of the picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from bim.orchestrator.reporting.figures.style import DPI, new_figure

GAP_PX = 8
"""Space between rows, and between groups of columns."""

MARGIN_PX, HEADING_PX, LINE_PX = 16, 26, 24
"""Space around the images, for the headings of columns, and for a line of the title or the note."""

CHARACTER_PX = 10.5
"""Width of a character of the title, generously."""


@dataclass(frozen=True)
class Group:
    """Columns of images under one heading.

    columns: (B, H, W, 3) each, in 0..1; values outside are clipped.
    """

    heading: str
    columns: Sequence[np.ndarray]


def tiled_figure(
    bands: Sequence[Sequence[Group]],
    sides: tuple[int, int],
    title: str = "",
    note: str = "",
    gap: int = GAP_PX,
) -> Figure:
    """Bands of groups, one below the other: a row for every image, a heading above every group.

    Args:
        bands: all images have one size.
        sides: least and largest side of an image in the picture, in pixels; small images are enlarged, large ones averaged
            over cells, by a whole number.
        title: above all; long ones are broken into lines.
        note: the same below all.
        gap: pixels between groups.
    """
    canvases = [_band(groups, sides, gap) for groups in bands]
    width = max(canvas.shape[1] for canvas, _ in canvases) + 2 * MARGIN_PX
    titles, notes = (_lines(text, width) for text in (title, note))
    images = sum(canvas.shape[0] + HEADING_PX for canvas, _ in canvases)
    gaps = (len(canvases) - 1) * MARGIN_PX
    height = 2 * MARGIN_PX + images + gaps + (len(titles) + len(notes)) * LINE_PX
    figure = new_figure(width / DPI, height / DPI)
    top = MARGIN_PX
    for line in titles:
        figure.text(0.5, 1 - top / height, line, ha="center", va="top", fontsize=9)
        top += LINE_PX
    for canvas, centers in canvases:
        top += HEADING_PX
        rows, columns = canvas.shape[:2]
        box = (MARGIN_PX / width, 1 - (top + rows) / height, columns / width, rows / height)
        axes = figure.add_axes(box)
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        for center, heading in centers:
            x, y = (MARGIN_PX + center) / width, 1 - (top - HEADING_PX / 3) / height
            figure.text(x, y, heading, ha="center", va="bottom", fontsize=8)
        top += rows + MARGIN_PX
    top -= MARGIN_PX // 2
    for line in notes:
        figure.text(0.5, 1 - top / height, line, ha="center", va="top", fontsize=8, color="0.3")
        top += LINE_PX
    return figure


def _band(
    groups: Sequence[Group], sides: tuple[int, int], gap: int
) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """The images of a band on one white canvas (H, W, 3), and the center of every group with its heading."""
    resized = [[_resized(np.clip(images, 0, 1), sides) for images in group.columns] for group in groups]
    rows, height, width = resized[0][0].shape[:3]
    inner = min(gap, GAP_PX // 2)
    lefts, centers, left = list[list[int]](), [], 0
    for group, columns in zip(groups, resized, strict=True):
        lefts.append([left + number * (width + inner) for number in range(len(columns))])
        right = lefts[-1][-1] + width
        centers.append(((left + right) / 2, group.heading))
        left = right + gap
    canvas = np.ones((rows * (height + GAP_PX) - GAP_PX, left - gap, 3))
    for columns, positions in zip(resized, lefts, strict=True):
        for images, position in zip(columns, positions, strict=True):
            for row, image in enumerate(images):
                top = row * (height + GAP_PX)
                canvas[top : top + height, position : position + width] = image
    return canvas, centers


def _resized(images: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """(B, H, W, 3) enlarged a whole number of times, or averaged over square cells."""
    smallest, largest = sides
    side = max(images.shape[1:3])
    if side <= largest:
        scale = max(1, -(-smallest // side))
        return images.repeat(scale, axis=1).repeat(scale, axis=2)
    cell = -(-side // largest)
    rows, columns = images.shape[1] // cell, images.shape[2] // cell
    cut = images[:, : rows * cell, : columns * cell]
    cells = cut.reshape(len(images), rows, cell, columns, cell, images.shape[3])
    return np.asarray(cells.mean(axis=(2, 4)))


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(20, int((width - 2 * MARGIN_PX) / CHARACTER_PX)))
