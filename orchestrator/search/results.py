"""What a search has found: a row per trial, the best of them, the front of quality against cost; and its files.

Written into OUT/search after every event, so that a search that is cut off loses nothing. Plain values in JSON, CSV and
YAML; knows no Ray and no MLflow.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.evaluation.metrics import standard_error
from bim.orchestrator.files import atomic_write
from bim.orchestrator.search.space import changes_text

FOLDER = "search"
RECORD, TABLE, BEST = "trials.json", "trials.csv", "best.yaml"

Status = Literal["waiting", "running", "finished", "stopped early", "infeasible", "failed"]

METRIC_NAMES = {"knn_top1": "kNN top-1", "rankme": "RankMe"}


@dataclass(frozen=True)
class TrialScore:
    """A trial's score after some epochs: the mean over the depths, and depth -> its own."""

    epoch: int
    score: float
    by_depth: dict[int, float]


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Args:
        number: 0 is the recipe's own setting.
        changes: every searched key with this trial's value.
        why: how it came to its status, in words.
        curve: its scores, by epoch.
        gflops: of the forward passes of one training image, averaged over the epochs; None if it never began.
        images_per_s: measured while others ran beside it.
        tune_id: how Tune names it.
    """

    number: int
    changes: dict[str, Any]
    status: Status = "running"
    why: str = ""
    curve: tuple[TrialScore, ...] = ()
    gflops: float | None = None
    images_per_s: float | None = None
    tune_id: str = ""

    @property
    def epoch(self) -> int:
        """Epochs that it was trained and scored for."""
        return self.curve[-1].epoch if self.curve else 0

    @property
    def score(self) -> float | None:
        """After its last epoch."""
        return self.curve[-1].score if self.curve else None

    def with_point(self, point: TrialScore) -> TrialRow:
        """The same with one more score; one of the same epoch is replaced."""
        others = [known for known in self.curve if known.epoch != point.epoch]
        return replace(self, curve=tuple(sorted([*others, point], key=lambda known: known.epoch)))


@dataclass(frozen=True)
class SearchResult:
    """A search, finished or under way.

    Args:
        metric: what the scores are: "knn_top1" or "rankme".
        images: how many each score was counted on.
        epochs: of a trial that is not stopped early.
        own: the recipe's own values of what is searched.
        asked: the `search` settings with which it was started.
        fingerprint: what the images were.
        rows: by number.
        finished: whether the best setting is known.
    """

    metric: str
    images: int
    epochs: int
    own: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    rows: tuple[TrialRow, ...] = ()
    finished: bool = False

    @property
    def best(self) -> TrialRow:
        """The trial with the highest last score among those trained for all epochs; of equal ones the first.

        Scores after fewer epochs are another quantity, so a trial that was stopped early is never the best. The
        recipe's own, trial 0, is never stopped early: the best is at least as good. Raises ValueError if none finished.
        """
        whole = self._whole()
        if not whole:
            raise ValueError("no trial of the search was trained to its end")
        return max(whole, key=lambda row: (row.score or 0.0, -row.number))

    @property
    def front(self) -> tuple[TrialRow, ...]:
        """The whole trials that no other beats both in score and in cost, the cheapest first."""
        found: list[TrialRow] = []
        for row in sorted(
            self._whole(), key=lambda row: (row.gflops or 0.0, -(row.score or 0.0), row.number)
        ):
            if not found or (row.score or 0.0) > (found[-1].score or 0.0):
                found.append(row)
        return tuple(found)

    def scored_at(self, epoch: int) -> dict[int, float]:
        """Trial -> its score after so many epochs, of those that came so far."""
        return {row.number: point.score for row in self.rows for point in row.curve if point.epoch == epoch}

    def best_at(self, epoch: int) -> TrialRow | None:
        """The trial with the highest score after so many epochs; of equal ones the first."""
        scored = self.scored_at(epoch)
        best = max(scored, key=lambda number: (scored[number], -number), default=None)
        return next((row for row in self.rows if row.number == best), None)

    def error_of(self, score: float) -> float | None:
        """Standard error of an accuracy on these images; depths err together, so their mean has about the same."""
        return standard_error(score, self.images) if self.metric == "knn_top1" else None

    def with_row(self, row: TrialRow) -> SearchResult:
        """The same with one row added or replaced."""
        rows = {known.number: known for known in self.rows} | {row.number: row}
        return replace(self, rows=tuple(rows[number] for number in sorted(rows)))

    def _whole(self) -> list[TrialRow]:
        return [row for row in self.rows if row.status == "finished" and row.epoch >= self.epochs]


def table_rows(result: SearchResult) -> list[dict[str, str | int | float]]:
    """The trials for a table, the best first, then by status and score; a column per searched setting and per depth."""
    best, front = result.best if result._whole() else None, {row.number for row in result.front}
    order: dict[str, int] = {
        status: place for place, status in enumerate(("finished", "stopped early", "running"))
    }
    depths = sorted({depth for row in result.rows for point in row.curve for depth in point.by_depth})
    rows = []
    for row in sorted(result.rows, key=lambda r: (order.get(r.status, 9), -(r.score or 0.0), r.number)):
        shown: dict[str, str | int | float] = {"trial": row.number}
        shown |= {key: _cell(value) for key, value in row.changes.items()}
        shown |= {"score": "" if row.score is None else round(row.score, 4)}
        by_depth = row.curve[-1].by_depth if row.curve else {}
        shown |= {
            f"depth{depth:02d}": round(by_depth[depth], 4) if depth in by_depth else "" for depth in depths
        }
        shown |= {
            "gflops_per_image": "" if row.gflops is None else float(f"{row.gflops:.4g}"),
            "images_per_s": "" if row.images_per_s is None else round(row.images_per_s),
            "epochs": row.epoch,
            "status": row.status,
            "why": row.why,
            "best": "best" if best is not None and row.number == best.number else "",
            "front": "front" if row.number in front else "",
        }
        rows.append(shown)
    return rows


def note_rows(result: SearchResult) -> list[dict[str, str]]:
    """The trials as a narrow table for people: what they changed, their score, their cost, how they ended."""
    marks = {row.number: "on the front" for row in result.front}
    marks |= {result.best.number: "best"} if result._whole() else {}
    rows = []
    for row in result.rows:
        shown = {"trial": str(row.number), "settings": changes_text(row.changes, result.own)}
        shown |= {METRIC_NAMES[result.metric]: "" if row.score is None else score_text(result, row.score)}
        shown |= {"GFLOPs": "" if row.gflops is None else f"{row.gflops:.3g}", "epochs": str(row.epoch)}
        shown |= {"": row.status, " ": marks.get(row.number, "")}
        rows.append(shown)
    return rows


def changes_of_best(result: SearchResult) -> dict[str, Any]:
    """What the best setting changes, by dotted key; nothing if it is the recipe's own."""
    return {key: value for key, value in result.best.changes.items() if value != result.own.get(key)}


def with_best(settings: Settings, result: SearchResult | None) -> Settings:
    """The settings with the best values of a finished search; as they are if there was none."""
    return settings if result is None else with_changes(settings, changes_of_best(result))


def best_line(result: SearchResult) -> str:
    """The outcome in a sentence: the best setting, its score, the recipe's own score, and how far chance reaches."""
    best, own, name = result.best, result.rows[0], METRIC_NAMES[result.metric]
    assert best.score is not None
    if best.number == 0:
        return f"best: trial 0, the recipe's own setting, {name} {score_text(result, best.score)}"
    error = result.error_of(best.score)
    beside = "" if own.score is None else f" against {score_text(result, own.score)} of the recipe's own"
    chance = "" if error is None else f"; one standard error is {error:.3f}"
    said = changes_text(best.changes, result.own)
    return f"best: trial {best.number}, {said}: {name} {score_text(result, best.score)}{beside}{chance}"


def score_text(result: SearchResult, score: float) -> str:
    """`0.812` of an accuracy, `41.3` of a rank."""
    return f"{score:.3f}" if result.metric == "knn_top1" else f"{score:.1f}"


def counted(rows: Sequence[TrialRow]) -> str:
    """`2 finished, 1 stopped early, 1 infeasible`."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    order = ("finished", "stopped early", "infeasible", "failed", "running", "waiting")
    return ", ".join(f"{counts[status]} {status}" for status in order if status in counts)


def save_result(out: Path, result: SearchResult, best_yaml: str | None = None) -> None:
    """Write the record and the table; `best_yaml`, the recipe of the best setting, ends the search."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / RECORD, json.dumps(asdict(result), indent=1) + "\n")
    text, rows = io.StringIO(), table_rows(result)
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    atomic_write(folder / TABLE, text.getvalue())
    if best_yaml is not None:
        atomic_write(folder / BEST, best_yaml)


def load_result(out: Path) -> SearchResult | None:
    """The search that was begun or finished in this output directory; None if there is none."""
    try:
        values = json.loads((out / FOLDER / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    rows = [_row(row) for row in values.pop("rows")]
    return SearchResult(**values, rows=tuple(rows))


def finished_search(out: Path) -> SearchResult | None:
    """The same, if it came to its end."""
    found = load_result(out)
    return found if found is not None and found.finished else None


def _row(values: Mapping[str, Any]) -> TrialRow:
    curve = [
        TrialScore(
            point["epoch"], point["score"], {int(depth): value for depth, value in point["by_depth"].items()}
        )
        for point in values["curve"]
    ]
    return TrialRow(**{**values, "curve": tuple(curve)})


def _cell(value: Any) -> str | int | float:
    return (
        value if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)
    )
