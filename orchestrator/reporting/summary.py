"""The final table of a run: every depth, what it costs and what it is worth, beside its references.

As text that a person reads in a terminal, and the same as rows for other programs (summary.json, summary.csv). Formats
what `evaluation.py` measured; measures and prints nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bim.orchestrator.evaluation.records import DepthReport
from bim.orchestrator.reporting.table import Column, note_lines, table_lines
from bim.orchestrator.text import NOT_MEASURED, _number, params_text, score_text, three_digits

Row = dict[str, str | int | float | None]

COLUMNS = (
    "weights",
    "depth",
    "params",
    "gflops",
    "latency_b1_ms",
    "latency_b64_ms",
    "knn_top1",
    "knn_top1_se",
    "linear_top1",
    "linear_top1_se",
    "rankme",
)

SCORE_TITLES = (("kNN top-1 %", "knn_top1"), ("linear top-1 %", "linear_top1"), ("RankMe", "rankme"))


def summary_rows(
    reports: Sequence[DepthReport],
    random_reports: Sequence[DepthReport] = (),
    raw: Mapping[str, float] | None = None,
    baseline_reports: Sequence[DepthReport] = (),
) -> list[Row]:
    """One flat row per measured thing, with the keys of `COLUMNS`; what was not measured is None.

    "weights" says what was measured: "trained", "mae" (the truncated baseline), "random" or "raw pixels".
    raw: accuracies of raw pixels, by the names of `Scores.metrics`.
    """
    groups = (("trained", reports), ("mae", baseline_reports), ("random", random_reports))
    measured: list[tuple[str, int | None, Mapping[str, float]]] = [
        (name, report.depth, report.metrics()) for name, group in groups for report in group
    ]
    if raw:
        measured.append(("raw pixels", None, raw))
    rows: list[Row] = []
    for weights, depth, values in measured:
        row: Row = {"weights": weights, "depth": depth}
        row |= {column: values.get(column) for column in COLUMNS[2:]}
        if depth is not None:
            row["params"] = int(values["params"])
        rows.append(row)
    return rows


def render_table(
    reports: Sequence[DepthReport],
    random_reports: Sequence[DepthReport] = (),
    raw: Mapping[str, float] | None = None,
    baseline_reports: Sequence[DepthReport] = (),
) -> str:
    """The table as plain text of at most 100 columns, with notes of at most 125 under it on what the figures are.

    Arguments as in `summary_rows`. A column of which nothing was measured is left out.
    """
    kinds = {"trained": reports, "MAE": baseline_reports, "random": random_reports}
    by_depth = {
        kind: {report.depth: report.metrics() for report in group} for kind, group in kinds.items() if group
    }
    depths = sorted({depth for group in by_depth.values() for depth in group})
    costs = {report.depth: report.metrics() for group in reversed(kinds.values()) for report in group}
    raw = raw or {}

    cost_columns = [Column("depth", tuple(str(depth) for depth in depths))]
    for title, key, form in (
        ("params", "params", params_text),
        ("GFLOPs", "gflops", three_digits),
        ("ms b1", "latency_b1_ms", three_digits),
        ("ms b64", "latency_b64_ms", three_digits),
    ):
        cells = tuple(form(costs[depth][key]) if key in costs[depth] else NOT_MEASURED for depth in depths)
        cost_columns.append(Column(title, cells))
    score_columns = []
    for title, key in SCORE_TITLES:
        pixels = score_text(raw, key) if raw else ""
        for kind, group in by_depth.items():
            cells = tuple(score_text(group.get(depth, {}), key) for depth in depths)
            heading = (kind, title) if len(by_depth) > 1 else (title, "")
            score_columns.append(Column(heading[0], cells, heading[1], pixels))
            title = pixels = ""  # over and under the first column of the group only
    return "\n".join((*table_lines(cost_columns, score_columns), "", *_notes(reports, by_depth)))


def write_summary(rows: Sequence[Row], folder: Path, columns: Sequence[str] = COLUMNS) -> tuple[Path, Path]:
    """The rows as summary.json (a list of objects) and summary.csv below `folder`; existing ones are replaced.

    columns: the keys of every row.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return (
        _replace(folder / "summary.json", json.dumps(list(rows), indent=2) + "\n"),
        _replace(folder / "summary.csv", text.getvalue()),
    )


@dataclass(frozen=True)
class ImprovementOverRandom:
    """How far trained weights are ahead of random ones in one score, over several runs with other seeds.

    mean: mean difference, 0..1. error: standard error of one run's difference, not divided by the number of runs, since
    they share their test images. least: the smallest difference of any run.
    """

    depth: int
    score: str
    mean: float
    error: float
    least: float


def improvements_over_random(runs: Sequence[Sequence[Row]]) -> list[ImprovementOverRandom]:
    """Every depth's lead over its own random start, from the `summary.json` rows of several runs.

    Raises ValueError if a run has no scores, or other depths than the first.
    """
    found = []
    tables = [{(row["weights"], row["depth"]): row for row in rows} for rows in runs]
    depths = sorted(
        {depth for weights, depth in tables[0] if weights == "trained" and isinstance(depth, int)}
    )
    for score in ("knn_top1", "linear_top1"):
        for depth in depths:
            differences, variances = [], []
            for table in tables:
                try:
                    trained, random = table["trained", depth], table["random", depth]
                    differences.append(_number(trained[score]) - _number(random[score]))
                    variances.append(
                        _number(trained[f"{score}_se"]) ** 2 + _number(random[f"{score}_se"]) ** 2
                    )
                except (KeyError, TypeError):
                    raise ValueError(f"a run has no {score} of depth {depth}, trained and random") from None
            error = (sum(variances) / len(variances)) ** 0.5
            found.append(
                ImprovementOverRandom(
                    depth, score, sum(differences) / len(differences), error, min(differences)
                )
            )
    return found


def _notes(
    reports: Sequence[DepthReport], by_depth: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> list[str]:
    """What the figures are, a line each; only what the table shows is explained."""
    notes = []
    tested = next((report.n_test for report in reports if report.n_test), 0)
    if tested:
        notes.append(("±", f"one standard error on {tested:,} test images"))
    ranked = next((report.n_ranked for report in reports if report.n_ranked), 0)
    if ranked:
        what = f"effective rank of the embeddings of {ranked:,} training images"
        notes.append(("RankMe", f"{what}; more is better, at most the embedding's width"))
    if tested or ranked:
        if "MAE" in by_depth:
            notes.append(("MAE", "the end-to-end baseline, cut to the same depth"))
        if "random" in by_depth:
            notes.append(("random", "the same depth before training"))
    size = next((report.image_size for report in reports if report.image_size), None)
    pixels = f" of {size[0]} x {size[1]} pixels" if size else ""
    notes.append(("GFLOPs", f"2 x multiply-accumulates, one image{pixels}"))
    device = next((report.device for report in reports if report.device), "")
    if device:
        notes.append(("ms", f"median time of a batch of 1 and of 64 on {device}"))
    lines = note_lines(notes)
    return lines if tested else [*lines, "No accuracy: the data has no labels."]


def _replace(path: Path, text: str) -> Path:
    """Write by renaming: whoever reads finds the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
    return path
