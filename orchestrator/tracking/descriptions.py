"""The texts on MLflow's pages of a run and of its depth variants: records in, Markdown out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from bim.orchestrator.evaluation.metric_info import COST, METRICS, QUALITY
from bim.orchestrator.tables import render
from bim.orchestrator.tracking.records import DepthRecord

CURVE_POINTS = 500
"""Points of a curve on a child run; the parent run has all of them."""

VIEW = "depth-variants"
"""Key of the saved view of the runs table that `runs_view` describes."""


def downsample(curve: Sequence[tuple[int, float]], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """At most `points` of the curve, evenly spread over it, its two ends among them."""
    if len(curve) <= points:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]


def rounded(value: float) -> float:
    """Four significant digits, or the whole number, which fit MLflow's tables. 0.91178 -> 0.9118."""
    return float(round(value)) if abs(value) >= 1e4 else float(f"{value:.4g}")


def summary_line(record: DepthRecord) -> str:
    """The quality and the cost of one variant in a line."""
    values = record.metrics
    quality = [f"{m.name} {m.cell(values)}{' %' * m.percent}" for m in QUALITY if m.key in values]
    return "; ".join([*quality, *(f"{m.text(values[m.key])} {m.name}" for m in COST if m.key in values)])


def depth_rows(records: Sequence[DepthRecord]) -> list[dict[str, str]]:
    """The results of some variants as rows for `results_table`."""
    return [
        {"model": record.title, **{m.heading: m.cell(record.metrics) for m in METRICS.values()}}
        for record in records
    ]


def results_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as preformatted text; MLflow sets a Markdown table without any space between its columns."""
    return fenced(render(rows, align="left"))


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
    """Markdown links from a run to the variants and the models of all runs."""
    experiment = f"#/experiments/{experiment_id}"
    return (
        f"[The depth variants of all runs]({experiment}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning), "
        "to be sorted by accuracy, latency or size; "
        f"[their models]({experiment}/models?workflowType=machine_learning)"
    )


def runs_view(now: int) -> str:
    """A saved view of the runs table in the format of MLflow 3.15 and later: the depth variants of all runs, the best first.

    MLflow's own page of models can be sorted by date only. now: milliseconds since 1970.
    """
    keys = [*(metric.key for metric in QUALITY), "latency_b1_ms", "params", "gflops"]
    metrics = [f"metrics.`{key}`" for key in keys]
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
