"""The records that the tracker takes. A leaf."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self


class MetricPoint(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    value: float
    milliseconds: int
    """Unix time at which it was measured."""


class UiPages(NamedTuple):
    """Where a person looks at a run.

    Args:
        command: that starts MLflow's pages; None if a server shows them already.
        variants: address of the depths of all runs of the experiment.
        run: address of the run.
    """

    command: str | None
    variants: str
    run: str


@dataclass(frozen=True)
class StoredRun:
    """What is known of a run in a store, without asking it.

    Args:
        start_time: Unix time in milliseconds.
    """

    run_id: str
    experiment_id: str
    name: str
    start_time: int


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
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of its run and of its registered version."""
    series: str = ""
    """Empty for the variants of this run; "mae" and the like for a baseline's."""

    @property
    def title(self) -> str:
        return f"{self.series} depth {self.depth}".strip()

    @property
    def variant(self) -> str:
        """What tells its run from those of the other variants: `depth6`, `mae-depth6`."""
        return f"{self.series}-depth{self.depth}".lstrip("-")

    def digest(self) -> str:
        """SHA-256 of the weights: equal weights are the same logged model, however often a run is finished."""
        with (self.folder / "model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def to_plain(self, out: Path) -> dict[str, Any]:
        """The record as values of JSON; files below `out` are named relative to it, so that it may be moved."""
        return asdict(self) | {
            "folder": relative_path(self.folder, out),
            "metrics": dict(self.metrics),
            "params": {key: str(value) for key, value in self.params.items()},
            "tags": dict(self.tags),
            "curves": {name: list(curve) for name, curve in self.curves.items()},
            "pictures": [relative_path(path, out) for path in self.pictures],
        }

    @classmethod
    def from_plain(cls, record: Mapping[str, Any], out: Path) -> Self:
        """The record of which `to_plain` gave these values."""
        files = {"folder": out / record["folder"], "pictures": [out / path for path in record["pictures"]]}
        return cls(**{**record, **files})


def relative_path(path: Path, out: Path) -> str:
    """The path relative to `out` if it lies below it, else as it is."""
    return str(path.relative_to(out) if path.is_relative_to(out) else path.absolute())
