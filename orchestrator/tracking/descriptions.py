"""The texts on MLflow's pages of a run and of its depth variants: records in, Markdown out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from bim.orchestrator.evaluation.metric_info import COST, METRICS, QUALITY
from bim.orchestrator.tables import render
from bim.orchestrator.tracking.records import DepthRecord

CURVE_POINTS = 500
"""Points of a curve on a child run; the parent run has all of them."""

LEVEL_TAG = "level_with_best"
"""Tag of a variant, `yes` or `no`: whether its accuracy cannot be told from that of the best depth of its run."""

SCORES_WHILE_TRAINING = {"knn_top1": "val_knn_top1", "rankme": "train_rankme"}
"""Metric -> its name on a variant that is being trained, which tells the split: the test split serves the end alone."""

MAX_TABLE_ROWS = 50
"""Rows of a table in a description; MLflow takes 8,000 characters, and there are links and pictures behind it."""

VIEW, VIEW_NAME = "depth-variants", "Depth variants"
"""Key and name of the saved view of the runs table that `runs_view` describes."""


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


def depth_rows(
    records: Sequence[DepthRecord], raw: Mapping[str, float] | None = None
) -> list[dict[str, str]]:
    """The results of some variants as rows for `results_table`; `raw` are those of raw pixels, if they were measured.

    Those of other series, baselines and random starts, are left out where there would be more than `MAX_TABLE_ROWS`.
    """
    if len(records) >= MAX_TABLE_ROWS:
        records = [record for record in records if not record.series]
    models = [(record.title, record.metrics) for record in records]
    models += [("raw pixels", raw)] if raw else []
    return [
        {"model": name, **{m.heading: m.cell(values) for m in METRICS.values()}} for name, values in models
    ]


def results_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as preformatted text; MLflow sets a Markdown table without any space between its columns."""
    return fenced(render(rows, align="left"))


def registered_name(model_name: str, depth: int) -> str:
    """The registered model of one depth, of which every run adds a version. `photos`, 6 -> `photos-depth06`"""
    return f"{model_name}-depth{depth:02d}"


def loading_note(registered: str, version: int, store: str | None) -> str:
    """Markdown that opens a version of a registered model where mlflow, torch and timm are installed, without this package.

    store: the tracking URI, if it is not what a reader in the same folder has by default.
    """
    lines = ["import mlflow, timm", ""]
    if store is not None:
        lines.append(f'mlflow.set_tracking_uri("{store}")')
    lines.append(f'folder = mlflow.artifacts.download_artifacts("models:/{registered}/{version}")')
    lines.append('model = timm.create_model("local-dir:" + folder, pretrained=True)')
    return fenced("\n".join(lines))


def picture(run_id: str, path: str) -> str:
    """Markdown that shows an artifact of a run on MLflow's own pages."""
    return f"![{Path(path).stem}](get-artifact?path={quote(path)}&run_uuid={run_id})"


def fenced(text: str) -> str:
    """Text that keeps its columns."""
    return f"```\n{text.rstrip()}\n```"


def page_address(page: str, **query: str) -> str:
    """The address of one of MLflow's pages, relative to the server."""
    # Without the parameter workflowType the pages of MLflow 3 open as those for language models, where models are hidden.
    return f"#/{page}?{urlencode({**query, 'workflowType': 'machine_learning'}, quote_via=quote)}"


def run_address(experiment_id: str, run_id: str) -> str:
    """The page of a run."""
    return page_address(f"experiments/{experiment_id}/runs/{run_id}")


def view_address(experiment_id: str) -> str:
    """The saved view *Depth variants* of an experiment."""
    return page_address(f"experiments/{experiment_id}/runs", viewStateShareKey=VIEW)


def pages(experiment_id: str) -> str:
    """Markdown links from a run to the variants and the models of all runs."""
    models = page_address(f"experiments/{experiment_id}/models")
    return (
        f"[The depth variants of all runs]({view_address(experiment_id)}), to be sorted by accuracy, latency or size; "
        f"[their models]({models})"
    )


def run_pages(experiment_id: str, run_id: str, losses: Sequence[str]) -> str:
    """Markdown links from a run to its own depths, to their curves, and to all its losses in one chart.

    losses: names of the metrics.
    """
    page = f"experiments/{experiment_id}/runs"
    of_depths = {
        "searchFilter": f"tags.mlflow.parentRunId = '{run_id}' and tags.variant LIKE '%depth%'",
        "orderByKey": f"metrics.`{QUALITY[0].key}`",
        "orderByAsc": "false",
    }
    depths = page_address(page, **of_depths)
    curves = page_address(page, **of_depths, compareRunsMode="CHART")
    chart = page_address(
        "metric",
        runs=json.dumps([run_id]),
        metric=json.dumps(losses[0]),
        experiments=json.dumps([experiment_id]),
        plot_metric_keys=json.dumps(list(losses)),
        plot_layout="{}",
        x_axis="step",
        y_axis_scale="linear",
        line_smoothness="1",
        show_point="false",
        deselected_curves="[]",
        last_linear_y_axis_range="[]",
    )
    return (
        f"[The depths of this run]({depths}), [their scores as curves]({curves}); "
        f"[the losses of all blocks in one chart]({chart})"
    )


def _column_px(column: str) -> int:
    """Wide enough for the whole heading of a column such as metrics.`knn_top1`."""
    return max(90, 25 + 8 * len(column.split("`")[1]))


def runs_view(now: int) -> str:
    """A saved view of the runs table in the format of MLflow 3.15 and later: the depth variants of all runs, the best first.

    MLflow's own page of models can be sorted by date only. now: milliseconds since 1970.
    """
    scores = [key for metric in QUALITY for key in (metric.key, *[f"{metric.key}_se"] * metric.percent)]
    keys = [*scores, "latency_b1_ms", "latency_b64_ms", "params", "gflops", *SCORES_WHILE_TRAINING.values()]
    metrics = [f"metrics.`{key}`" for key in keys]
    level = f"tags.`{LEVEL_TAG}`"
    first = ["attributes.`Run Name`", "runDateAndNestInfo", "duration"]
    selected = [metrics[0], metrics[1], level, *metrics[2:], "attributes.`Models`"]
    state = {
        "selectedColumns": selected,
        "columnOrder": [*first, *selected],
        "columnWidths": {first[0]: 280} | {column: _column_px(column) for column in selected},
        "searchFilter": "tags.variant LIKE '%depth%'",
        "orderByKey": metrics[0],
        "orderByAsc": False,
    }
    view = {"name": VIEW_NAME, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    return json.dumps(view)
