"""Progress of a search: lines of the log, and trials for the tracker."""

from __future__ import annotations

import logging
from typing import Protocol

from bim.orchestrator.config.messages import format_value
from bim.orchestrator.evaluation.metric_info import METRICS
from bim.orchestrator.search.results import SearchResult, TrialRow, best_line, status_counts
from bim.orchestrator.search.space import Choice, Space, changes_text
from bim.orchestrator.text import duration, wrapped

log = logging.getLogger(__name__)


class TrialSink(Protocol):
    """Records trials; `bim.orchestrator.tracking.tracker.Tracker` is one. Must not raise."""

    def log_trial(self, row: TrialRow, metric: str) -> None: ...


class SearchProgress:
    """A callback of a search."""

    def __init__(self, sink: TrialSink) -> None:
        self._sink = sink

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        resumed = f" continues after epoch {row.epoch}" if row.curve else ""
        self._report(
            row, f"trial {row.number}{resumed}: {changes_text(row.changes, result.baseline_values)}", result
        )

    def on_score(self, result: SearchResult, row: TrialRow) -> None:
        assert row.score is not None
        metric, best, rivals = METRICS[result.metric], result.best_at(row.epoch), result.scores_at(row.epoch)
        rank = ""
        if best is not None and best.number != row.number:
            relation = "=" if rivals[best.number] == row.score else "behind"
            rank = f"  {relation} trial {best.number} ({metric.text(rivals[best.number])})"
        elif len(rivals) > 1:
            rank = "  new best"
        log.info(
            f"trial {row.number}  epoch {row.epoch:{len(str(result.epochs))}d}/{result.epochs}  "
            f"{metric.name} {metric.text(row.score)}{rank}"
        )
        self._sink.log_trial(row, result.metric)

    def on_retry(self, result: SearchResult, row: TrialRow) -> None:
        self._report(row, f"trial {row.number}  failed, retrying once: {row.status_reason}", result)

    def on_end(self, result: SearchResult, row: TrialRow) -> None:
        if row.status == "stopped early":
            self._report(row, f"trial {row.number}  stopped {row.status_reason}", result)
        elif row.status != "finished":
            self._report(row, f"trial {row.number}  {row.status}: {row.status_reason}", result)
        else:
            self._sink.log_trial(row, result.metric)

    def _report(self, row: TrialRow, text: str, result: SearchResult) -> None:
        for line in wrapped(text):
            log.info(line)
        self._sink.log_trial(row, result.metric)


def opening(
    result: SearchResult,
    grace: int,
    space: Space,
    trials: int,
    run_concurrently: int,
    max_seconds: float,
) -> list[str]:
    """What is searched, the metric that ranks trials, and how long it may take."""
    concurrent = f", {run_concurrently} at a time" if run_concurrently > 1 else ""
    images = "validation images" if result.metric == "knn_top1" else "training images, without labels"
    lines = [
        f"search: {trials} trials of {result.epochs} epochs{concurrent}, ranked by {METRICS[result.metric].name} of "
        f"{result.images} {images}, mean over all depths; ASHA, grace period {grace} epochs"
    ]
    for key, values in space.items():
        if isinstance(values, Choice):
            default, *others = map(format_value, values.values)
            lines.append(f"  {key}: {default} (baseline), {', '.join(others) or 'no other value'}")
        else:
            scale = ", log scale" if values.log else ""
            default = format_value(result.baseline_values[key])
            lines.append(f"  {key}: {default} (baseline), {values.low:g} to {values.high:g}{scale}")
    return [
        *(part for line in lines for part in wrapped(line)),
        f"  at most about {duration(max_seconds)} if nothing else runs here; --search.trials 0 trains without a search",
    ]


def closing(result: SearchResult, seconds: float, recipe: str) -> list[str]:
    """How the search ended, and the setting that the run continues with."""
    lines = [f"search: {status_counts(result.rows)}, in {duration(seconds)}", best_line(result)]
    return [*(part for line in lines for part in wrapped(line)), f"  as a recipe: {recipe}"]
