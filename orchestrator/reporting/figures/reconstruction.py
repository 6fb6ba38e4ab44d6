"""Reconstructions: test images masked, predicted, and original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from bim.orchestrator.reporting.figures.tiles import Group, tiled_figure

GRAY = 0.5
"""Value of masked pixels: neither the black background of scans nor the white of drawings."""

CHECKERS = (0.35, 0.65)
"""Values of the quarters of a patch that is not predicted."""

MIN_IMAGE_PX, MAX_IMAGE_PX = 190, 448
"""Least and largest side at which an image of one depth is shown."""

GRID_SIDES = (150, 256)
"""The same where all depths share a picture."""

THROWN_NOTE = "checkered patches are thrown (decoder.throw_ratio): the decoder predicts nothing there"

VEIL = 0.6
"""Fraction of gray in patches that some of the depths see."""

VEILED_NOTE = "veiled patches are seen by the shallower depths alone, as in their training"


@dataclass(frozen=True)
class Reconstructions:
    """Images and what a decoder predicts of them.

    Args:
        original, predicted: (B, H, W, 3), not normalized; values outside 0..1 are clipped.
        masked: (B, M) indices of tokens that are predicted.
        grid: (rows, columns) of tokens.
        target: (B, H, W, 3), an image of the true target if it is not pixels.
        thrown: (B, T) indices of masked tokens that are not predicted; they are checkered among the predictions.
        borrowed_note: what the picture takes from the true image where a prediction does not hold it, in words.
    """

    original: np.ndarray
    predicted: np.ndarray
    masked: np.ndarray
    grid: tuple[int, int]
    target: np.ndarray | None = None
    thrown: np.ndarray | None = None
    borrowed_note: str = ""

    @property
    def is_visible(self) -> np.ndarray:
        """(B, H, W, 1) bool, the pixels that the encoder sees."""
        return ~(self._is_predicted | self._is_thrown)

    @property
    def masked_input(self) -> np.ndarray:
        """(B, H, W, 3), what the encoder sees."""
        return np.where(self.is_visible, self.original, GRAY)

    @property
    def reconstructed(self) -> np.ndarray:
        """(B, H, W, 3), the predictions among the visible patches of the image or, of another target, alone on gray."""
        visible = self.original if self.target is None else np.full_like(self.original, GRAY)
        unpredicted = np.where(self._is_thrown, _checkers(self.grid, self.original.shape[1:3]), visible)
        return np.where(self._is_predicted, self.predicted, unpredicted)

    @property
    def notes(self) -> list[str]:
        """What a reader of the picture should know."""
        return [note for note in (self.borrowed_note, THROWN_NOTE if self._is_thrown.any() else "") if note]

    @property
    def _is_predicted(self) -> np.ndarray:
        return _is_masked(self.masked, self.grid, self.original.shape[1:3])

    @property
    def _is_thrown(self) -> np.ndarray:
        if self.thrown is None:
            return np.zeros((*self.original.shape[:3], 1), dtype=bool)
        return _is_masked(self.thrown, self.grid, self.original.shape[1:3])


def reconstruction_figure(images: Reconstructions, title: str = "") -> Figure:
    """One row per image: masked | reconstructed | original. Visible patches are those of the image, not predictions.

    Of a target that is not pixels: masked | predicted | target | original.
    """
    groups = [Group("masked", [images.masked_input])]
    if images.target is None:
        groups.append(Group("reconstructed", [images.reconstructed]))
    else:
        groups += [Group("predicted", [images.reconstructed]), Group("target", [images.target])]
    groups.append(Group("original", [images.original]))
    return tiled_figure([groups], (MIN_IMAGE_PX, MAX_IMAGE_PX), title, "; ".join(images.notes))


def reconstruction_grid(by_depth: Mapping[int, Reconstructions], title: str = "") -> Figure:
    """One row per image: original | masked | a column for every depth, all of the same images under one mask.

    Where mask ratios grow with the depth, the masked images show what all depths see, and veiled what some of them see.
    Images of a target that is not pixels stand before the first depth that has it.
    """
    depths = sorted(by_depth)
    first = by_depth[depths[0]]
    visible = np.stack([by_depth[depth].is_visible for depth in depths])
    by_all, by_some = visible.all(axis=0), visible.any(axis=0)
    unseen = np.where(by_some, VEIL * GRAY + (1 - VEIL) * first.original, GRAY)
    groups = [
        Group("original", [first.original]),
        Group("masked", [np.where(by_all, first.original, unseen)]),
    ]
    target: np.ndarray | None = None
    for depth in depths:
        images = by_depth[depth]
        if images.target is not None and (target is None or not np.array_equal(target, images.target)):
            target = images.target
            groups.append(Group("target", [target]))
        groups.append(Group(f"depth {depth}", [images.reconstructed]))
    notes = [VEILED_NOTE] if (by_some != by_all).any() else []
    return tiled_figure([groups], GRID_SIDES, title, "; ".join([*notes, *_notes(by_depth)]))


def _notes(by_depth: Mapping[int, Reconstructions]) -> list[str]:
    """The notes of all depths, each with the depths that it is about if those are not all."""
    depths: dict[str, list[int]] = {}
    for depth, images in sorted(by_depth.items()):
        for note in images.notes:
            depths.setdefault(note, []).append(depth)
    return [
        note + (f" (depth {', '.join(map(str, of))})" if len(of) < len(by_depth) else "")
        for note, of in depths.items()
    ]


def _is_masked(masked: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """masked: (B, M) units -> (B, H, W, 1), True in every pixel of a masked unit."""
    units = np.zeros((len(masked), grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(units, masked, True, axis=1)
    pixels = units.reshape(len(masked), *grid)
    return pixels.repeat(size[0] // grid[0], axis=1).repeat(size[1] // grid[1], axis=2)[..., None]


def _checkers(grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """(H, W, 1), every unit of the grid in two times two quarters of two grays."""
    rows, columns = (2 * np.arange(side) * units // side for side, units in zip(size, grid, strict=True))
    return np.asarray(np.where((rows[:, None] + columns) % 2, *CHECKERS[::-1]))[..., None]
