"""The records that the tracker takes. A leaf."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class MetricPoint(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    value: float
    milliseconds: int
    """Unix time at which it was measured."""


@dataclass(frozen=True)
class DepthRecord:
    """One depth variant, trained and evaluated."""

    depth: int
    folder: Path
    """Its timm folder: model.safetensors, config.json, README.md."""
    metrics: Mapping[str, float]
    """Evaluation, by the keys of `metric_info.METRICS`."""
    params: Mapping[str, object] = field(default_factory=dict)
    """The few settings that make this variant; the rest is on the parent run."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) over the training, e.g. of the loss of its block and of images_per_s."""
    pictures: Sequence[Path] = ()
    step: int = 0
    """Optimizer steps that the weights have seen."""
    series: str = ""
    """Empty for the variants of this run; "mae" and the like for a baseline's."""

    @property
    def title(self) -> str:
        return f"{self.series} depth {self.depth}".strip()

    @property
    def alias(self) -> str:
        return f"{self.series}-depth{self.depth}".lstrip("-")

    def digest(self) -> str:
        """SHA-256 of the weights: equal weights are the same logged model, however often a run is finished."""
        with (self.folder / "model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
