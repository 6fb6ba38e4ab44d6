"""Progress of a search: lines of the log, and trials for the tracker."""

from __future__ import annotations

import logging
import math
import time
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
    """A callback of a search.

    Args:
        trials: of the whole search.
        concurrent: that run at the same time.
    """

    def __init__(self, sink: TrialSink, trials: int = 0, concurrent: int = 1) -> None:
        self._sink, self._trials, self._concurrent = sink, trials, concurrent
        self._started: dict[int, tuple[float, int]] = {}

    def on_begin(self, result: SearchResult, row: TrialRow) -> None:
        self._started[row.number] = (time.monotonic(), row.epoch)
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
        if row.status == "finished":
            self._log_time_left(result, row)
            self._sink.log_trial(row, result.metric)
            return
        reason = row.status_reason if row.status == "stopped early" else f": {row.status_reason}"
        text = f"trial {row.number}  {'stopped ' if row.status == 'stopped early' else row.status}{reason}"
        if row.number == 0:
            text += "; the search goes on without the baseline config"
        self._report(row, text, result)

    def _log_time_left(self, result: SearchResult, row: TrialRow) -> None:
        """How long the search takes at most, from the time that a whole trial took."""
        left = self._trials - sum(other.status not in ("waiting", "running") for other in result.rows)
        start, epoch = self._started.get(row.number, (0.0, row.epoch))
        if left > 0 and row.epoch > epoch:
            trial_s = (time.monotonic() - start) * row.epoch / (row.epoch - epoch)
            text = duration(trial_s * math.ceil(left / self._concurrent))
            log.info(f"search: {left} of {self._trials} trials left, at most about {text}")

    def _report(self, row: TrialRow, text: str, result: SearchResult) -> None:
        for line in wrapped(text):
            log.info(line)
        self._sink.log_trial(row, result.metric)


def opening(
    result: SearchResult,
    grace: int,
    space: Space,
    trials: int,
    concurrent: int,
) -> list[str]:
    """What is searched, and the metric that ranks trials."""
    suffix = f", {concurrent} at a time" if concurrent > 1 else ""
    images = "validation images" if result.metric == "knn_top1" else "training images, without labels"
    lines = [
        f"search: {trials} trials of {result.epochs} epochs{suffix}, ranked by {METRICS[result.metric].name} of "
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
        "  --search.trials 0 trains without a search",
    ]


def closing(result: SearchResult, seconds: float, recipe: str) -> list[str]:
    """How the search ended, and the setting that the run continues with."""
    lines = [f"search: {status_counts(result.rows)}, in {duration(seconds)}", best_line(result)]
    return [*(part for line in lines for part in wrapped(line)), f"  as a recipe: {recipe}"]
