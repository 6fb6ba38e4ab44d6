"""Prediction targets: image -> what is predicted per mask unit. To add one: a class in a file, a line in `TARGETS`."""

from __future__ import annotations

from models.targets.pixels import PixelTarget
from models.targets.target import Target

TARGETS = {"pixels": PixelTarget}

__all__ = ["TARGETS", "PixelTarget", "Target"]
