"""Prediction targets: image -> values of each token. To add one: a class in a file and a line in `TARGETS`."""

from __future__ import annotations

from collections.abc import Callable

from bim.models.targets.hog import HogTarget
from bim.models.targets.pixels import PixelTarget
from bim.models.targets.target import Target

TARGETS: dict[str, Callable[..., Target]] = {"pixels": PixelTarget, "hog": HogTarget}
"""What makes a target takes the pixels per side of a token, and those of the keywords `normalize`, `cell` and `bins` that it
declares: the settings of these names."""

BUILT_IN_TARGETS = frozenset(TARGETS)

__all__ = ["BUILT_IN_TARGETS", "TARGETS", "HogTarget", "PixelTarget", "Target"]
