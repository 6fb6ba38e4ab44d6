"""Results of a search: a row per trial, the best of them, the Pareto front of quality and cost. `record` has their files."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.evaluation.metric_info import METRICS, MetricInfo
from bim.orchestrator.evaluation.metrics import standard_error
from bim.orchestrator.evaluation.pareto import pareto_front
from bim.orchestrator.search.space import changes_text

Status = Literal["finished", "stopped early", "infeasible", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Score:
    """The metric of every depth variant of a checkpoint; higher is better.

    Args:
        metric: "knn_top1" (0..1) or "rankme" (1..width of the embedding).
        by_depth: depth in layers -> the metric of that variant.
        images: how many it was counted on.
    """

    metric: str
    by_depth: dict[int, float]
    images: int

    @property
    def mean(self) -> float:
        """The mean over the depths: the score of a trial."""
        return statistics.mean(self.by_depth.values())


@dataclass(frozen=True)
class TrialScore:
    """Score of a trial after some epochs: the mean over the depths, and depth -> score of that variant."""

    epoch: int
    score: float
    by_depth: dict[int, float]


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Args:
        number: 0 is the baseline, the recipe without changes.
        changes: every searched key with the value of this trial.
        status_reason: the cause of the status, in words.
        curve: its scores, by epoch.
        gflops: of the forward passes of one training image, averaged over the epochs; None before the first score.
        images_per_s: measured beside concurrent trials.
    """

    number: int
    changes: dict[str, Any]
    status: Status = "running"
    status_reason: str = ""
    curve: tuple[TrialScore, ...] = ()
    gflops: float | None = None
    images_per_s: float | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it is not tried again when the search is continued; one that failed is."""
        return self.status in ("finished", "stopped early", "infeasible")

    @property
    def epoch(self) -> int:
        """The last epoch with a score; 0 if there is none."""
        return self.curve[-1].epoch if self.curve else 0

    @property
    def score(self) -> float | None:
        """The score after that epoch."""
        return self.curve[-1].score if self.curve else None

    def with_score(self, score: TrialScore) -> TrialRow:
        """A copy with one more score; one of the same epoch is replaced."""
        by_epoch = {known.epoch: known for known in self.curve} | {score.epoch: score}
        return replace(self, curve=tuple(by_epoch[epoch] for epoch in sorted(by_epoch)))


@dataclass(frozen=True)
class SearchResult:
    """A search, finished or not.

    Args:
        metric: key of the metric of the scores, in `METRICS`.
        images: number of images of each score.
        epochs: of a trial that is not stopped early.
        baseline_values: the recipe's value of every searched key.
        search_settings: the settings on which the scores of the search depend.
        fingerprint: of the images.
        rows: by number.
        finished: the best setting is known.
    """

    metric: str
    images: int
    epochs: int
    baseline_values: dict[str, Any]
    search_settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    rows: tuple[TrialRow, ...] = ()
    finished: bool = False

    @property
    def info(self) -> MetricInfo:
        """Name and format of the metric."""
        return METRICS[self.metric]

    @property
    def best(self) -> TrialRow:
        """The trial with the highest last score among those trained for all epochs; of equal ones the first.

        Scores after fewer epochs are another quantity, so a trial that was stopped early is never the best. The baseline,
        trial 0, is never stopped early: the best is at least as good. Raises ValueError if none finished.
        """
        completed = self.completed
        if not completed:
            raise ValueError("no trial of the search was trained to its end")
        return max(completed, key=lambda row: (row.score or 0.0, -row.number))

    @property
    def pareto_front(self) -> tuple[TrialRow, ...]:
        """The trials trained for all epochs that no other beats in both score and cost, the cheapest first."""
        rows = self.completed
        optimal = pareto_front([row.gflops or 0.0 for row in rows], [row.score or 0.0 for row in rows])
        return tuple(rows[index] for index in optimal)

    def scores_at(self, epoch: int) -> dict[int, float]:
        """Trial number -> score after `epoch` epochs, of those that have one."""
        return {row.number: score.score for row in self.rows for score in row.curve if score.epoch == epoch}

    def best_at(self, epoch: int) -> TrialRow | None:
        """The trial with the highest score after `epoch` epochs; of equal ones the first."""
        scores = self.scores_at(epoch)
        best = max(scores, key=lambda number: (scores[number], -number), default=None)
        return next((row for row in self.rows if row.number == best), None)

    def error_of(self, score: float) -> float | None:
        """Standard error of an accuracy on these images; depths err together, so their mean has about the same."""
        return standard_error(score, self.images) if self.info.percent else None

    def with_row(self, row: TrialRow) -> SearchResult:
        """A copy with one row added or replaced."""
        rows = {known.number: known for known in self.rows} | {row.number: row}
        return replace(self, rows=tuple(rows[number] for number in sorted(rows)))

    @property
    def completed(self) -> list[TrialRow]:
        """The trials that were trained for all epochs."""
        return [row for row in self.rows if row.status == "finished" and row.epoch >= self.epochs]


def table_rows(result: SearchResult) -> list[dict[str, str | int | float]]:
    """The trials for a table, the best first, then by status and score; a column per searched setting and per depth."""
    best = result.best if result.completed else None
    optimal = {row.number for row in result.pareto_front}
    statuses = get_args(Status)
    depths = sorted({depth for row in result.rows for score in row.curve for depth in score.by_depth})
    rows = []
    for row in sorted(result.rows, key=lambda r: (statuses.index(r.status), -(r.score or 0.0), r.number)):
        by_depth = row.curve[-1].by_depth if row.curve else {}
        cells: dict[str, str | int | float] = {"trial": row.number}
        cells |= {key: _cell(value) for key, value in row.changes.items()}
        cells |= {"score": "" if row.score is None else round(row.score, 4)}
        cells |= {
            f"depth{depth:02d}": round(by_depth[depth], 4) if depth in by_depth else "" for depth in depths
        }
        cells |= {
            "gflops_per_image": "" if row.gflops is None else float(f"{row.gflops:.4g}"),
            "images_per_s": "" if row.images_per_s is None else round(row.images_per_s),
            "epochs": row.epoch,
            "status": row.status,
            "status_reason": row.status_reason,
            "best": "best" if row == best else "",
            "pareto_front": "pareto_front" if row.number in optimal else "",
        }
        rows.append(cells)
    return rows


def note_rows(result: SearchResult) -> list[dict[str, str]]:
    """The trials as a narrow table for people: changes, score, cost, status."""
    marks = {row.number: "Pareto front" for row in result.pareto_front}
    marks |= {result.best.number: "best"} if result.completed else {}
    return [
        {
            "trial": str(row.number),
            "settings": changes_text(row.changes, result.baseline_values),
            result.info.name: "" if row.score is None else result.info.text(row.score),
            "GFLOPs": "" if row.gflops is None else f"{row.gflops:.3g}",
            "epochs": str(row.epoch),
            "": row.status,
            " ": marks.get(row.number, ""),
        }
        for row in result.rows
    ]


def changes_of_best(result: SearchResult) -> dict[str, Any]:
    """The changes of the best setting, by dotted key; none if it is the baseline."""
    baseline = result.baseline_values
    return {key: value for key, value in result.best.changes.items() if value != baseline.get(key)}


def with_best(settings: Settings, result: SearchResult | None) -> Settings:
    """The settings with the best values of a finished search; unchanged without a search."""
    return settings if result is None else with_changes(settings, changes_of_best(result))


def best_line(result: SearchResult) -> str:
    """The outcome in a sentence: the best setting, its score, the score of the baseline, the standard error."""
    best, baseline, text = result.best, result.rows[0], result.info.text
    assert best.score is not None
    notes = []
    if best is not baseline and baseline.score is not None:
        notes.append(f"baseline {text(baseline.score)}")
    if (error := result.error_of(best.score)) is not None:
        notes.append(f"standard error {error:.3f}")
    line = f"best: trial {best.number}, {changes_text(best.changes, result.baseline_values)}: "
    return f"{line}{result.info.name} {text(best.score)}" + (f" ({', '.join(notes)})" if notes else "")


def status_counts(rows: Sequence[TrialRow]) -> str:
    """`2 finished, 1 stopped early, 1 infeasible`."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status])


def _cell(value: Any) -> str | int | float:
    """A value as a cell of a CSV file: numbers and text as they are, others as JSON."""
    is_plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return value if is_plain else json.dumps(value)
