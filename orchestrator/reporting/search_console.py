"""What a person reads while a search runs, and what its tracker hears of it.

Prints nothing by itself: the caller gives the function that does. Knows no Ray and no MLflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bim.orchestrator.config.messages import format_value
from bim.orchestrator.search.results import (
    SearchResult,
    TrialRow,
    best_line,
    status_counts,
)
from bim.orchestrator.search.space import Choice, Space, changes_text
from bim.orchestrator.text import duration, wrapped


class TrialSink(Protocol):
    """Where trials are recorded; `bim.orchestrator.tracking.tracker.Tracker` is one. Must not raise."""

    def log_trial(self, row: TrialRow, metric: str) -> None: ...

    def log_event(self, text: str) -> None: ...


class SearchProgress:
    """A listener of a search.

    Args:
        say: takes one line for the reader.
    """

    def __init__(self, say: Callable[[str], None], sink: TrialSink) -> None:
        self._say, self._sink = say, sink

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        again = f" goes on after epoch {row.epoch}" if row.curve else ""
        self._tell(
            row, f"trial {row.number}{again}: {changes_text(row.changes, result.baseline_values)}", result
        )

    def on_score(self, result: SearchResult, row: TrialRow) -> None:
        assert row.score is not None
        best, rivals = result.best_at(row.epoch), result.scores_at(row.epoch)
        beside = ""
        if best is not None and best.number != row.number:
            where = "level with" if rivals[best.number] == row.score else "behind"
            beside = f"  {where} trial {best.number} ({result.info.text(rivals[best.number])})"
        elif len(rivals) > 1:
            beside = "  best so far"
        self._say(
            f"trial {row.number}  epoch {row.epoch:{len(str(result.epochs))}d}/{result.epochs}  "
            f"{result.info.name} {result.info.text(row.score)}{beside}"
        )
        self._sink.log_trial(row, result.metric)

    def on_retry(self, result: SearchResult, row: TrialRow) -> None:
        self._tell(row, f"trial {row.number}  failed and is tried once more: {row.status_reason}", result)

    def on_end(self, result: SearchResult, row: TrialRow) -> None:
        if row.status == "stopped early":
            self._tell(row, f"trial {row.number}  stopped {row.status_reason}", result)
        elif row.status != "finished":
            self._tell(row, f"trial {row.number}  {row.status}: {row.status_reason}", result)
        else:
            self._sink.log_trial(row, result.metric)

    def _tell(self, row: TrialRow, text: str, result: SearchResult) -> None:
        for line in wrapped(text):
            self._say(line)
        self._sink.log_event(text)
        self._sink.log_trial(row, result.metric)


def opening(
    result: SearchResult,
    grace: int,
    space: Space,
    trials: int,
    run_concurrently: int,
    at_most_s: float,
) -> list[str]:
    """What is about to be searched, by what it is ranked, and how long it may take."""
    beside = f", {run_concurrently} side by side" if run_concurrently > 1 else ""
    judged = "validation images" if result.metric == "knn_top1" else "training images, without labels"
    lines = [
        f"search: {trials} trials of {result.epochs} epochs{beside}, ranked by {result.info.name} of "
        f"{result.images} {judged}, the mean of all depths; the weak are stopped early, after "
        f"{grace} epochs at the soonest"
    ]
    for key, values in space.items():
        if isinstance(values, Choice):
            tried = ", ".join(format_value(value) for value in values.values[1:]) or "nothing else"
            lines.append(f"  {key}: {format_value(values.values[0])} (the recipe's), {tried}")
        else:
            how = ", by its logarithm" if values.log else ""
            baseline = format_value(result.baseline_values[key])
            lines.append(f"  {key}: {baseline} (the recipe's), {values.low:g} to {values.high:g}{how}")
    return [
        *(part for line in lines for part in wrapped(line)),
        f"  it takes about {duration(at_most_s)} or less if nothing else runs here; "
        "--search.trials 0 trains without it",
    ]


def closing(result: SearchResult, seconds: float, recipe: str) -> list[str]:
    """How the search ended, and what the run goes on with."""
    lines = [f"search: {status_counts(result.rows)}, in {duration(seconds)}", best_line(result)]
    return [*(part for line in lines for part in wrapped(line)), f"  as a recipe: {recipe}"]
