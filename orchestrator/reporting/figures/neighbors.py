"""Nearest neighbors: a few images, and the training images most similar to each by every depth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from bim.orchestrator.reporting.figures.tiles import Group, tiled_figure

SIDES = (64, 72)
"""Least and largest side at which an image is shown, in pixels."""

DEPTHS_ABREAST = 2


def neighbors_figure(
    images: np.ndarray, by_depth: Mapping[int, np.ndarray], title: str = "", note: str = ""
) -> Figure:
    """One row per image: the image, then its neighbors by one depth and by the next; further depths stand below.

    Args:
        images: (B, H, W, 3) in 0..1.
        by_depth: depth -> (B, k, H, W, 3) in 0..1, the nearest first.
    """
    groups = [
        Group(f"nearest by depth {depth}", [neighbors[:, rank] for rank in range(neighbors.shape[1])])
        for depth, neighbors in sorted(by_depth.items())
    ]
    bands = [
        [Group("image", [images]), *groups[first : first + DEPTHS_ABREAST]]
        for first in range(0, len(groups), DEPTHS_ABREAST)
    ]
    return tiled_figure(bands, SIDES, title, note, gap=24)
