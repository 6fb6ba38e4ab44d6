"""Reconstructions: test images masked, predicted, and original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from bim.orchestrator.reporting.figures.tiles import Group, tiled_figure

GRAY = 0.5
"""Value of masked pixels: neither the black background of scans nor the white of drawings."""

MIN_IMAGE_PX, MAX_IMAGE_PX = 190, 448
"""Least and largest side at which an image of one depth is shown."""

GRID_SIDES = (150, 256)
"""The same where all depths share a picture."""


@dataclass(frozen=True)
class Reconstructions:
    """Images and what a decoder predicts of them.

    Args:
        original, predicted: (B, H, W, 3), not normalized; values outside 0..1 are clipped.
        masked: (B, M) indices of tokens that are predicted.
        grid: (rows, columns) of tokens.
        target: (B, H, W, 3), an image of the true target if it is not pixels.
        thrown: (B, T) indices of masked tokens that are not predicted; they stay gray.
        lent: what the picture takes from the true image where a prediction does not hold it, in words.
    """

    original: np.ndarray
    predicted: np.ndarray
    masked: np.ndarray
    grid: tuple[int, int]
    target: np.ndarray | None = None
    thrown: np.ndarray | None = None
    lent: str = ""

    @property
    def masked_input(self) -> np.ndarray:
        """(B, H, W, 3), what the encoder sees."""
        return np.where(self._is_predicted, GRAY, self._without_thrown)

    @property
    def reconstructed(self) -> np.ndarray:
        """(B, H, W, 3), the predictions among the visible patches of the image or, of another target, alone on gray."""
        return np.where(
            self._is_predicted, self.predicted, self._without_thrown if self.target is None else GRAY
        )

    @property
    def _is_predicted(self) -> np.ndarray:
        return _is_masked(self.masked, self.grid, self.original.shape[1:3])

    @property
    def _without_thrown(self) -> np.ndarray:
        if self.thrown is None:
            return self.original
        return np.where(_is_masked(self.thrown, self.grid, self.original.shape[1:3]), GRAY, self.original)


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
    return tiled_figure([groups], (MIN_IMAGE_PX, MAX_IMAGE_PX), title, _lent_note({0: images}))


def reconstruction_grid(by_depth: Mapping[int, Reconstructions], title: str = "") -> Figure:
    """One row per image: original | masked | a column for every depth, all of the same images under the same mask.

    Where the mask of a depth differs from that of the depth before it, its own masked images stand before it; likewise
    the images of a target that is not pixels.
    """
    first = next(iter(by_depth.values()))
    groups = [Group("original", [first.original])]
    masked: np.ndarray | None = None
    target: np.ndarray | None = None
    for depth, images in sorted(by_depth.items()):
        if masked is None or not np.array_equal(masked, images.masked_input):
            masked = images.masked_input
            groups.append(Group("masked", [masked]))
        if images.target is not None and (target is None or not np.array_equal(target, images.target)):
            target = images.target
            groups.append(Group("target", [target]))
        groups.append(Group(f"depth {depth}", [images.reconstructed]))
    return tiled_figure([groups], GRID_SIDES, title, _lent_note(by_depth))


def _lent_note(by_depth: Mapping[int, Reconstructions]) -> str:
    """What is lent, with the depths if not all of them borrow the same."""
    depths: dict[str, list[int]] = {}
    for depth, images in sorted(by_depth.items()):
        depths.setdefault(images.lent, []).append(depth)
    depths.pop("", None)
    return "; ".join(
        lent + (f" (depth {', '.join(map(str, of))})" if len(of) < len(by_depth) else "")
        for lent, of in depths.items()
    )


def _is_masked(masked: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """masked: (B, M) units -> (B, H, W, 1), True in every pixel of a masked unit."""
    units = np.zeros((len(masked), grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(units, masked, True, axis=1)
    pixels = units.reshape(len(masked), *grid)
    return pixels.repeat(size[0] // grid[0], axis=1).repeat(size[1] // grid[1], axis=2)[..., None]
