"""What a person reads in MLflow about a depth variant: its record, and the Markdown notes made from it.

Pure values and text; knows no MLflow. Serves `tracking.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CURVE_POINTS = 500
"""Points of a curve on a child run; the parent run keeps them all."""


@dataclass(frozen=True)
class DepthRecord:
    """One depth variant, trained and evaluated."""

    depth: int
    folder: Path
    """Its timm folder: model.safetensors, config.json, README.md."""
    metrics: Mapping[str, float]
    """Evaluation, by the names of `DepthReport.metrics()`: knn_top1, linear_top1, params, gflops, latency_b1_ms, ..."""
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
        """Of the weights: equal weights are the same model, however often a run is finished."""
        with (self.folder / "model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def thinned(curve: Sequence[tuple[int, float]], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """At most `points` of the curve, evenly spread over it, its two ends among them."""
    if len(curve) <= points:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]


def loading_line(model_name: str, alias: str) -> str:
    """Python that opens a registered variant where mlflow, torch and timm are installed, and this package is not."""
    uri = f"models:/{model_name}@{alias}"
    return f'timm.create_model("local-dir:" + mlflow.artifacts.download_artifacts("{uri}"), pretrained=True)'


def results_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; the columns are the keys of the rows in their order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---:"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def depth_rows(records: Sequence[DepthRecord]) -> list[dict[str, object]]:
    """The results of some variants as rows for people: accuracies with their standard errors, sizes in millions."""
    rows = []
    for record in records:
        m = record.metrics
        row: dict[str, object] = {"model": record.title}
        if "params" in m:
            row["parameters"] = f"{m['params'] / 1e6:.2f} M"
        if "gflops" in m:
            row["GFLOPs"] = f"{m['gflops']:.3g}"
        for key, name in (("latency_b1_ms", "latency, batch 1"), ("latency_b64_ms", "latency, batch 64")):
            if key in m:
                row[name] = f"{m[key]:.3g} ms"
        for key, name in (("knn_top1", "kNN top-1"), ("linear_top1", "linear probe top-1")):
            if key in m:
                row[name] = _with_error(m[key], m.get(f"{key}_se"))
        rows.append(row)
    return rows


def loading_note(model_name: str, alias: str, store: str | None) -> str:
    """How to open one variant, as Markdown. `store`: the tracking URI if it is not the reader's default."""
    setting = "" if store is None else f'mlflow.set_tracking_uri("{store}")\n'
    return f"```python\nimport mlflow, timm\n\n{setting}model = {loading_line(model_name, alias)}\n```"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|")
