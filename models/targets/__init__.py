"""Prediction targets: image -> values of each token. To add one: a class in a file and a line in `TARGETS`."""

from __future__ import annotations

from bim.models.targets.hog import HogTarget
from bim.models.targets.pixels import PixelTarget
from bim.models.targets.target import Target

TARGETS = {"pixels": PixelTarget, "hog": HogTarget}

__all__ = ["TARGETS", "HogTarget", "PixelTarget", "Target"]
