"""What a person reads in MLflow about a run and its depth variants: their record, and the texts made from it.

Pure values and text; knows no MLflow. Serves `tracking.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from bim.orchestrator.text import rank_text
from bim.orchestrator.tracking.records import DepthRecord

CURVE_POINTS = 500
"""Points of a curve on a child run; the parent run keeps them all."""

ACCURACIES = (("knn_top1", "kNN top-1"), ("linear_top1", "linear probe top-1"))

VIEW = "depth-variants"
"""Key of the saved view of the runs table that `runs_view` describes."""


def downsample(curve: Sequence[tuple[int, float]], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """At most `points` of the curve, evenly spread over it, its two ends among them."""
    if len(curve) <= points:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]


def rounded(value: float) -> float:
    """Four significant digits, or the whole number: what MLflow's tables can show. 0.91178 -> 0.9118."""
    return float(round(value)) if abs(value) >= 1e4 else float(f"{value:.4g}")


def summary_line(record: DepthRecord) -> str:
    """One variant in a line: what it is worth and what it costs."""
    m = record.metrics
    parts = [f"{name} {text}" for name, text in _worth(m).items()]
    if "params" in m:
        parts.append(f"{m['params'] / 1e6:.2f} M parameters")
    if "gflops" in m:
        parts.append(f"{m['gflops']:.3g} GFLOPs")
    if "latency_b1_ms" in m:
        parts.append(f"{m['latency_b1_ms']:.3g} ms per image")
    return ", ".join(parts)


def depth_rows(records: Sequence[DepthRecord]) -> list[dict[str, str]]:
    """The results of some variants as rows for people: accuracies with standard errors or RankMe, sizes in millions."""
    rows = []
    for record in records:
        m = record.metrics
        row = {"model": record.title, **_worth(m)}
        if "params" in m:
            row["parameters"] = f"{m['params'] / 1e6:.2f} M"
        if "gflops" in m:
            row["GFLOPs"] = f"{m['gflops']:.3g}"
        for key, name in (("latency_b1_ms", "ms, batch 1"), ("latency_b64_ms", "ms, batch 64")):
            if key in m:
                row[name] = f"{m[key]:.3g}"
        rows.append(row)
    return rows


def results_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as preformatted Markdown; the columns are their keys in order of appearance.

    MLflow sets a Markdown table without any space between its columns.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "   ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]
    return fenced("\n".join(lines))


def loading_note(model_name: str, alias: str, store: str | None) -> str:
    """Markdown that opens a variant where mlflow, torch and timm are installed, and this package is not.

    store: the tracking URI, if it is not what a reader in the same folder has by default.
    """
    lines = ["import mlflow, timm", ""]
    if store is not None:
        lines.append(f'mlflow.set_tracking_uri("{store}")')
    lines.append(f'folder = mlflow.artifacts.download_artifacts("models:/{model_name}@{alias}")')
    lines.append('model = timm.create_model("local-dir:" + folder, pretrained=True)')
    return fenced("\n".join(lines))


def picture(run_id: str, path: str) -> str:
    """Markdown that shows an artifact of a run on MLflow's own pages."""
    return f"![{Path(path).stem}](get-artifact?path={quote(path)}&run_uuid={run_id})"


def fenced(text: str) -> str:
    """Text that keeps its columns."""
    return f"```\n{text.rstrip()}\n```"


def pages(experiment_id: str) -> str:
    """Markdown links from a run to what one looks for next."""
    experiment = f"#/experiments/{experiment_id}"
    return (
        f"[The depth variants of all runs]({experiment}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning), "
        "to be sorted by accuracy, latency or size; "
        f"[their models]({experiment}/models?workflowType=machine_learning)"
    )


def runs_view(now: int) -> str:
    """A saved view of the runs table, as MLflow 3.15 and later keep it: the depth variants of all runs, the best first.

    MLflow's own page of models can be sorted by date only. now: milliseconds since 1970.
    """
    metrics = [
        f"metrics.`{name}`"
        for name in ("knn_top1", "linear_top1", "rankme", "latency_b1_ms", "params", "gflops")
    ]
    first = ["attributes.`Run Name`", "runDateAndNestInfo", "duration"]
    state = {
        "selectedColumns": ["attributes.`Models`", *metrics],
        "columnOrder": [*first, "attributes.`Models`", *metrics],
        "columnWidths": {first[0]: 280},
        "searchFilter": "tags.variant LIKE '%depth%'",
        "orderByKey": metrics[0],
        "orderByAsc": False,
    }
    view = {"name": "Depth variants", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    return json.dumps(view)


def _worth(metrics: Mapping[str, float]) -> dict[str, str]:
    """What was measured of the scores, by their names in words."""
    named = {
        name: _with_error(metrics[key], metrics.get(f"{key}_se"))
        for key, name in ACCURACIES
        if key in metrics
    }
    return named | ({"RankMe": rank_text(metrics["rankme"])} if "rankme" in metrics else {})


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
