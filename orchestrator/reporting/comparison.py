"""The table of a run with several backbones: cost and quality of every depth of each, and which are Pareto-optimal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bim.orchestrator.evaluation.metric_info import COST, METRICS, QUALITY, RANKED_BY
from bim.orchestrator.evaluation.pareto import pareto_front
from bim.orchestrator.reporting.summary import COLUMNS, NO_LABELS, NOTES, Row, number
from bim.orchestrator.tables import Key, note_lines, render

ALL_COLUMNS = ("backbone", "status", *COLUMNS, "pareto_front", "cause")

WEIGHTS = {"trained": "trained", "MAE": "mae", "random": "random"}
"""Heading -> value of the column `weights`."""


@dataclass(frozen=True)
class MemberResult:
    """One backbone of a run.

    Args:
        name: of its folder and its rows.
        backbone: timm name.
        size: (height, width) of the images that it is evaluated on.
        rows: those of its own summary; none if it failed.
        failed: the cause in a sentence; None if it finished.
    """

    name: str
    backbone: str
    size: tuple[int, int]
    rows: tuple[Row, ...] = ()
    failed: str | None = None

    @property
    def trained(self) -> list[Row]:
        """The rows of its depth variants."""
        return [row for row in self.rows if row["weights"] == "trained"]

    def row(self, weights: str, depth: object) -> Row | None:
        """The row of one depth, None if it was not measured."""
        return next((row for row in self.rows if (row["weights"], row["depth"]) == (weights, depth)), None)

    @property
    def title(self) -> str:
        """The line above its rows."""
        names = [self.name] if self.backbone == self.name else [self.name, self.backbone]
        return ", ".join([*names, f"{self.size[0]} x {self.size[1]} px"])


def read_rows(out: Path) -> tuple[Row, ...]:
    """The rows that a finished run left in its output directory.

    Raises:
        OSError, ValueError: there is no `summary.json`, or it holds something else.
    """
    path = out / "summary.json"
    try:
        rows = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise ValueError(f"{path} does not hold the rows of a table of results")
    return tuple(rows)


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and {"depth", "latency_b1_ms"} <= row.keys()
        and isinstance(row.get("weights"), str)
        and all(
            value is None or isinstance(value, int | float) for key, value in row.items() if key != "weights"
        )
    )


def cost_key(results: Sequence[MemberResult]) -> str:
    """The cost that depths are compared by: the latency if all of them were timed, else GFLOPs."""
    rows = [row for result in results for row in result.trained]
    return "latency_b1_ms" if rows and all(row["latency_b1_ms"] is not None for row in rows) else "gflops"


def quality_key(results: Sequence[MemberResult]) -> str | None:
    """The metric that depths are compared by: the first of `RANKED_BY` that was measured; None without any."""
    rows = [row for result in results for row in result.trained]
    return next((key for key in RANKED_BY if any(row.get(key) is not None for row in rows)), None)


def pareto_depths(results: Sequence[MemberResult], metric: str | None = None) -> list[tuple[str, object]]:
    """(name, depth) of the Pareto-optimal variants, the cheapest first.

    metric: key of the quality; that of `quality_key` by default.
    """
    cost, metric = cost_key(results), metric or quality_key(results)
    if metric is None:
        return []
    points = sorted(
        (number(row[cost]), -number(row[metric]), result.name, row["depth"])
        for result in results
        for row in result.trained
        if row.get(metric) is not None
    )
    optimal = pareto_front([point[0] for point in points], [-point[1] for point in points])
    return [points[index][2:] for index in optimal]


def comparison_rows(results: Sequence[MemberResult]) -> list[Row]:
    """One flat row for every model that was measured and for every backbone that failed; keys are `ALL_COLUMNS`."""
    optimal = set(pareto_depths(results))
    rows: list[Row] = []
    for result in results:
        common: Row = dict.fromkeys(ALL_COLUMNS) | {"backbone": result.name, "status": "finished"}
        if result.failed is not None:
            rows.append(common | {"status": "failed", "cause": result.failed})
            continue
        for row in result.rows:
            is_optimal = int((result.name, row["depth"]) in optimal) if row["weights"] == "trained" else None
            rows.append(common | row | {"pareto_front": is_optimal})
    return rows


def comparison_table(results: Sequence[MemberResult], num_test: int = 0, device: str = "") -> str:
    """All backbones as text, each below its name; one that failed is a line with its cause.

    num_test: test images that the accuracies were counted on. device: where the latencies were measured.
    """
    finished = [result for result in results if result.trained]
    lines = [render(_table_rows(finished))] if finished else []
    lines += [f"{result.name}  FAILED: {result.failed}" for result in results if result.failed is not None]
    if finished:
        lines += ["", *note_lines(_notes(finished, num_test, device))]
        if quality_key(finished) != "knn_top1":
            lines.append(NO_LABELS)
    return "\n".join(lines)


def _table_rows(results: Sequence[MemberResult]) -> list[dict[Key, str]]:
    optimal = set(pareto_depths(results))
    columns: list[Key] = ["" if optimal else "depth", "depth", *(metric.heading for metric in COST)]
    columns += [(metric.heading, name) for metric in QUALITY for name in WEIGHTS]
    rows: list[dict[Key, str]] = []
    for result in results:
        rows.append(dict.fromkeys(columns, "") | {columns[0]: result.title})
        for trained in result.trained:
            depth = trained["depth"]
            row: dict[Key, str] = {"": "*" if (result.name, depth) in optimal else "", "depth": str(depth)}
            row |= {metric.heading: metric.cell(_values(trained)) for metric in COST}
            for name, weights in WEIGHTS.items():
                values = _values(result.row(weights, depth))
                row |= {(metric.heading, name): metric.cell(values) for metric in QUALITY}
            rows.append(row)
    return rows


def _values(row: Row | None) -> dict[str, float | None]:
    return {key: None if (row or {}).get(key) is None else number((row or {})[key]) for key in COLUMNS[2:]}


def _notes(results: Sequence[MemberResult], num_test: int, device: str) -> list[tuple[str, str]]:
    """Terms of the table and what they mean."""
    notes = []
    quality, cost = quality_key(results), cost_key(results)
    if quality is not None:
        name = METRICS[quality].name
        notes.append(
            ("*", f"Pareto-optimal: nothing as cheap ({METRICS[cost].heading}) has as good a {name}")
        )
    if quality == "knn_top1":
        notes.append(("±", f"one standard error on {num_test:,} test images"))
    if quality == "rankme":
        rank = "effective rank of the embeddings, at most their width"
        notes.append(("RankMe", f"{rank}; compare different widths with caution"))
    weights = {row["weights"] for result in results for row in result.rows}
    if quality is not None:
        notes += [(name, text) for name, text in NOTES.items() if WEIGHTS[name] in weights]
    notes.append(("GFLOPs", "2 x multiply-accumulates, one image"))
    if cost == "latency_b1_ms":
        notes.append(("ms", "median time of a batch of 1 and of 64" + (f" on {device}" if device else "")))
    return notes
