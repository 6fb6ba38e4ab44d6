"""The final table of a run: cost and quality of every depth, beside its references.

As text for a terminal, and as rows for other programs (summary.json, summary.csv).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bim.orchestrator.evaluation.metric_info import ACCURACIES, COST, QUALITY, MetricInfo
from bim.orchestrator.files import atomic_write, make_folder
from bim.orchestrator.tables import Key, note_lines, render

if TYPE_CHECKING:
    from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult

Cell = str | int | float | None
Row = dict[str, Cell]

COLUMNS = (
    "weights",
    "depth",
    *(metric.key for metric in COST),
    *(key for metric in QUALITY for key in metric.keys),
)

NOTES = {
    "MAE": "the end-to-end baseline, cut to the same depth",
    "random": "the same depth before training",
}
"""Reference -> what it is, for the lines under a table."""

NO_LABELS = "No accuracy: the data has no labels."


def summary_rows(evaluation: EvaluationResult, baseline: Sequence[DepthReport] = ()) -> list[Row]:
    """One flat row per model that was measured, with the keys of `COLUMNS`; what was not measured is None.

    "weights" is one of "trained", "mae" (the truncated baseline), "random" and "raw pixels".
    baseline: the depths of the baseline, if there was one.
    """
    groups = (("trained", evaluation.reports), ("mae", baseline), ("random", evaluation.random))
    measured: list[tuple[str, int | None, Mapping[str, float]]] = [
        (name, report.depth, report.metrics()) for name, group in groups for report in group
    ]
    if evaluation.raw:
        measured.append(("raw pixels", None, evaluation.raw))
    rows: list[Row] = []
    for weights, depth, values in measured:
        row: Row = {"weights": weights, "depth": depth}
        row |= {column: values.get(column) for column in COLUMNS[2:]}
        if depth is not None:
            row["params"] = int(values["params"])
        rows.append(row)
    return rows


def render_table(evaluation: EvaluationResult, baseline: Sequence[DepthReport] = ()) -> str:
    """The table as text of at most 100 columns, with notes under it on what the figures are.

    Arguments as in `summary_rows`. A column of which nothing was measured is left out.
    """
    groups = {"trained": evaluation.reports, "MAE": baseline, "random": evaluation.random}
    by_depth = {
        name: {report.depth: report.metrics() for report in group} for name, group in groups.items() if group
    }
    depths = sorted({depth for group in by_depth.values() for depth in group})
    costs = {depth: values for group in reversed(by_depth.values()) for depth, values in group.items()}

    def key(metric: MetricInfo, name: str) -> Key:
        return (metric.heading, name) if len(by_depth) > 1 else metric.heading

    rows: list[dict[Key, str]] = []
    for depth in depths:
        row: dict[Key, str] = {"depth": str(depth)}
        row |= {metric.heading: metric.cell(costs[depth]) for metric in COST}
        row |= {
            key(metric, name): metric.cell(group.get(depth, {}))
            for metric in QUALITY
            for name, group in by_depth.items()
        }
        rows.append(row)
    if raw := evaluation.raw:
        scored = [metric for metric in QUALITY if metric.key in raw]
        rows.append({"depth": "raw pixels", **{key(m, "trained"): m.cell(raw) for m in scored}})
    return "\n".join([render(rows), "", *_notes(evaluation.reports, by_depth)])


def write_summary(rows: Sequence[Row], folder: Path, columns: Sequence[str] = COLUMNS) -> tuple[Path, Path]:
    """The rows as summary.json (a list of objects) and summary.csv below `folder`; existing ones are replaced.

    columns: the keys of every row.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    make_folder(folder)
    as_json, as_csv = folder / "summary.json", folder / "summary.csv"
    atomic_write(as_json, json.dumps(list(rows), indent=2) + "\n")
    atomic_write(as_csv, text.getvalue())
    return as_json, as_csv


def number(value: str | float | None) -> float:
    """The number in a cell of a row. Raises TypeError if it was not measured."""
    if value is None:
        raise TypeError("not measured")
    return float(value)


@dataclass(frozen=True)
class ImprovementOverRandom:
    """Difference between trained and random weights in one metric, over several runs with other seeds.

    Args:
        mean: mean difference, 0..1.
        error: standard error of one run's difference, not divided by the number of runs, since they share their test
            images.
        min_difference: the smallest difference of any run.
    """

    depth: int
    metric: str
    mean: float
    error: float
    min_difference: float


def improvements_over_random(runs: Sequence[Sequence[Row]]) -> list[ImprovementOverRandom]:
    """The improvement of every depth over its own random start, from the `summary.json` rows of several runs.

    Raises ValueError if a run has no accuracies, or other depths than the first.
    """
    tables = [{(row["weights"], row["depth"]): row for row in rows} for rows in runs]
    depths = sorted(
        {depth for weights, depth in tables[0] if weights == "trained" and isinstance(depth, int)}
    )
    return [_improvement(tables, depth, metric.key) for metric in ACCURACIES for depth in depths]


def _improvement(
    tables: Sequence[Mapping[tuple[Cell, Cell], Row]], depth: int, key: str
) -> ImprovementOverRandom:
    differences, variances = [], []
    for table in tables:
        try:
            trained, random = table["trained", depth], table["random", depth]
            differences.append(number(trained[key]) - number(random[key]))
            variances.append(number(trained[f"{key}_se"]) ** 2 + number(random[f"{key}_se"]) ** 2)
        except (KeyError, TypeError):
            raise ValueError(f"a run has no {key} of depth {depth}, trained and random") from None
    mean, error = sum(differences) / len(differences), (sum(variances) / len(variances)) ** 0.5
    return ImprovementOverRandom(depth, key, mean, error, min(differences))


def _notes(reports: Sequence[DepthReport], groups: Mapping[str, object]) -> list[str]:
    """What the figures are, a line each; only what the table shows is explained."""
    notes = []
    num_test = next((report.n_test for report in reports if report.n_test), 0)
    if num_test:
        notes.append(("±", f"one standard error on {num_test:,} test images"))
    num_ranked = next((report.n_ranked for report in reports if report.n_ranked), 0)
    if num_ranked:
        rank = f"effective rank of embeddings of {num_ranked:,} training images, at most their width"
        notes.append(("RankMe", f"{rank}; more is better"))
    if num_test or num_ranked:
        notes += [(name, text) for name, text in NOTES.items() if name in groups]
    size = next((report.image_size for report in reports if report.image_size), None)
    pixels = f" of {size[0]} x {size[1]} pixels" if size else ""
    notes.append(("GFLOPs", f"2 x multiply-accumulates, one image{pixels}"))
    device = next((report.device for report in reports if report.device), "")
    if device:
        notes.append(("ms", f"median time of a batch of 1 and of 64 on {device}"))
    return note_lines(notes) + [NO_LABELS] * (not num_test)
