"""The table of a run with several backbones: every depth of every one, what it costs and is worth, and who is on the front.

Rows in (those of each backbone's own summary), rows, text and files out. Measures and prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bim.orchestrator.reporting.summary import COLUMNS, SCORE_TITLES, Row
from bim.orchestrator.reporting.table import Column, note_lines, table_lines
from bim.orchestrator.text import NOT_MEASURED, params_text, score_text, three_digits

ALL_COLUMNS = ("backbone", "status", *COLUMNS, "on_front", "cause")

SCORES = {"knn_top1": "kNN", "rankme": "RankMe"}
"""What the front can be about, against `cost_of`, and what it is called; the first that was measured counts."""


@dataclass(frozen=True)
class MemberResult:
    """One backbone of a run.

    Args:
        name: of its folder and its rows.
        backbone: timm name.
        size: (height, width) of the images it is scored on.
        rows: those of its own summary; none if it failed.
        failed: why, in a sentence; None if it came to its end.
    """

    name: str
    backbone: str
    size: tuple[int, int]
    rows: tuple[Row, ...] = ()
    failed: str | None = None

    @property
    def trained(self) -> list[Row]:
        """The rows of its depth variants."""
        return self._of("trained")

    def _of(self, weights: str) -> list[Row]:
        return [row for row in self.rows if row["weights"] == weights]

    def row(self, weights: str, depth: object) -> Row | None:
        """What was measured of one depth, None if it was not."""
        return next((row for row in self._of(weights) if row["depth"] == depth), None)

    @property
    def title(self) -> str:
        """What stands over its rows."""
        known = [] if self.backbone == self.name else [self.backbone]
        return f"{self.name}, {', '.join([*known, f'{self.size[0]} x {self.size[1]} px'])}"


def read_rows(out: Path) -> tuple[Row, ...]:
    """The rows that a finished run left in its output directory."""
    return tuple(json.loads((out / "summary.json").read_text(encoding="utf-8")))


def cost_of(results: Sequence[MemberResult]) -> str:
    """The column that the depths are compared by: the latency where all of them were timed, else the arithmetic."""
    rows = [row for result in results for row in result.trained]
    return "latency_b1_ms" if rows and all(row["latency_b1_ms"] is not None for row in rows) else "gflops"


def score_of(results: Sequence[MemberResult]) -> str | None:
    """The column that the depths are compared by: kNN where there are labels, else RankMe; None if neither was measured."""
    rows = [row for result in results for row in result.trained]
    return next((score for score in SCORES if any(row.get(score) is not None for row in rows)), None)


def front(results: Sequence[MemberResult], score: str | None = None) -> list[tuple[str, object]]:
    """(name, depth) of the variants than which none is both no dearer and better; the cheapest first.

    score: the column that counts; that of `score_of` if it is not given.
    """
    cost, score = cost_of(results), score or score_of(results)
    if score is None:
        return []
    points = sorted(
        (_number(row[cost]), -_number(row[score]), result.name, row["depth"])
        for result in results
        for row in result.trained
        if row.get(score) is not None
    )
    found: list[tuple[str, object]] = []
    best = float("inf")
    for _, loss, name, depth in points:
        if loss < best:
            found.append((name, depth))
            best = loss
    return found


def comparison_rows(results: Sequence[MemberResult]) -> list[Row]:
    """One flat row for everything that was measured, and one for every backbone that failed; keys are `ALL_COLUMNS`."""
    best = set(front(results))
    rows: list[Row] = []
    for result in results:
        empty: Row = dict.fromkeys(ALL_COLUMNS)
        own: Row = empty | {"backbone": result.name, "status": "finished"}
        if result.failed is not None:
            rows.append(own | {"status": "failed", "cause": result.failed})
            continue
        for row in result.rows:
            on_front = (result.name, row["depth"]) in best if row["weights"] == "trained" else None
            rows.append(own | row | {"on_front": None if on_front is None else int(on_front)})
    return rows


def comparison_table(results: Sequence[MemberResult], tested: int = 0, device: str = "") -> str:
    """All backbones as plain text, each below its name; one that failed is a line with its cause.

    tested: test images that the accuracies were counted on. device: what the latencies were measured on.
    """
    lines = [(result, row) for result in results for row in result.trained]
    notes: list[tuple[str, str]] = []
    text: list[str] = []
    score = score_of(results)
    if lines:
        best, cost = set(front(results)), cost_of(results)
        table = table_lines(*_columns(lines, best))
        text, body = table[: -len(lines)], table[-len(lines) :]
        for result in results:
            if result.failed is None:
                text.append(result.title)
                text += [body.pop(0) for _ in result.trained]
        named = {"latency_b1_ms": "ms b1", "gflops": "GFLOPs"}[cost]
        if score is not None:
            notes.append(("*", f"nothing else here has as good a {SCORES[score]} at as low a cost ({named})"))
        if score == "knn_top1":
            notes.append(("±", f"one standard error on {tested:,} test images"))
        if score == "rankme":
            what = "effective rank of the embeddings, at most their width; more is better"
            notes.append(("RankMe", f"{what}, but compare different widths with caution"))
        if any(result.row("mae", row["depth"]) for result, row in lines):
            notes.append(("MAE", "the end-to-end baseline, cut to the same depth"))
        if score is not None and any(result.row("random", row["depth"]) for result, row in lines):
            notes.append(("random", "the same depth before training"))
        notes.append(("GFLOPs", "2 x multiply-accumulates, one image"))
        if cost == "latency_b1_ms":
            on = f" on {device}" if device else ""
            notes.append(("ms", f"median time of a batch of 1 and of 64{on}"))
    text += [f"{result.name}  FAILED: {result.failed}" for result in results if result.failed is not None]
    if notes:
        text += ["", *note_lines(notes)]
    if lines and score != "knn_top1":
        text.append("No accuracy: the data has no labels.")
    return "\n".join(text)


def _columns(
    lines: Sequence[tuple[MemberResult, Row]], best: set[tuple[str, object]]
) -> tuple[list[Column], list[Column]]:
    costs = [
        Column("", tuple("*" if (result.name, row["depth"]) in best else "" for result, row in lines)),
        Column("depth", tuple(str(row["depth"]) for _, row in lines)),
    ]
    for title, key, form in (
        ("params", "params", params_text),
        ("GFLOPs", "gflops", three_digits),
        ("ms b1", "latency_b1_ms", three_digits),
        ("ms b64", "latency_b64_ms", three_digits),
    ):
        cells = tuple(NOT_MEASURED if row[key] is None else form(_number(row[key])) for _, row in lines)
        costs.append(Column(title, cells))
    scores = []
    kinds = {"trained": "trained", "MAE": "mae", "random": "random"}
    for title, key in SCORE_TITLES:
        for kind, weights in kinds.items():
            cells = tuple(_score(result.row(weights, row["depth"]), key) for result, row in lines)
            if any(cell != NOT_MEASURED for cell in cells):
                scores.append(Column(kind, cells, title))
                title = ""  # over the first column of the group only
    return costs, scores


def _score(row: Row | None, key: str) -> str:
    values = {} if row is None else row
    measured = {name: _number(values[name]) for name in (key, f"{key}_se") if values.get(name) is not None}
    return score_text(measured, key)


def _number(value: str | float | None) -> float:
    assert value is not None
    return float(value)
