"""The controller of a running search: turns Tune's events into rows of its record and calls of its callback.

Of Tune's trials it uses `trial_id` and `config` alone.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.distributed.placement import PlacementError
from bim.orchestrator.search.results import SearchResult, TrialRow, TrialScore, save_result
from bim.orchestrator.search.space import Space, decode_config
from bim.orchestrator.search.trial import TrialSpec
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

PLACEMENT_TIMEOUT_S = 120.0
"""Seconds without any started trial, after which the search gives up; `placement.wait_s` gives more."""


@dataclass(frozen=True)
class SearchSpec:
    """A search that is ready to start.

    Args:
        settings: the recipe.
        space: the values that are tried.
        trial: what every trial shares.
        initial: the record of this search before its first trial.
    """

    settings: Settings
    space: Space
    trial: TrialSpec
    initial: SearchResult

    @property
    def grace_period(self) -> int:
        """Epochs before the first trial may be stopped: at least those to the first score.

        ASHA records a score that comes late for a rung at that rung, beside scores of other epochs.
        """
        return grace_period(self.settings, self.initial.epochs)


def grace_period(settings: Settings, epochs: int) -> int:
    """See `SearchSpec.grace_period`; epochs: of a trial.

    By default half of them, and the warm-up: features of masked modeling are worse than random ones at first.
    """
    grace = settings.search.grace_epochs
    if grace is None:
        grace = max(math.ceil(epochs / 2), math.ceil(settings.schedule.warmup_epochs))
    return min(max(grace, settings.search.every_epochs), epochs)


class SearchCallback(Protocol):
    """Receiver of the events of a search; its methods must not raise."""

    def on_begin(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_score(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_retry(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_end(self, result: SearchResult, row: TrialRow) -> None: ...


class SearchController:
    """State of the running search: its record, whether it has to stop, and the cause.

    Args:
        result: the record so far, `spec.initial` for a new search.
        out: output directory of the run; the record is written below it after every event.
        interrupt: called once to end the search before its last trial.
    """

    def __init__(
        self,
        spec: SearchSpec,
        result: SearchResult,
        out: Path,
        callback: SearchCallback,
        stop: StopRequest,
        interrupt: Callable[[], None],
    ) -> None:
        self.spec, self.result = spec, result
        self.error: Exception | None = None
        self._out, self._callback, self._stop, self._interrupt = out, callback, stop, interrupt
        self._start_time = time.monotonic()
        self._interrupted = self._any_started = False

    def completed_trials(self) -> dict[str, dict[str, Any]]:
        """The last report of every completed trial, by `trial_id`; failed trials are not among them and may be retried."""
        reports: dict[str, dict[str, Any]] = {}
        for row in self.result.rows:
            if row.status == "infeasible":
                reports[row.tune_id] = {"infeasible": row.status_reason}
            elif row.status in ("finished", "stopped early"):
                last = row.curve[-1]
                depths = {str(depth): value for depth, value in last.by_depth.items()}
                reports[row.tune_id] = {
                    "epoch": last.epoch,
                    "score": last.score,
                    "depths": depths,
                    "gflops": row.gflops,
                }
        return reports

    def on_step(self, trials: Sequence[Any]) -> None:
        """Called several times a second, in the main thread of the driver."""
        for trial in trials:
            self._row(trial)
        timeout_s = max(PLACEMENT_TIMEOUT_S, self.spec.settings.placement.wait_s)
        waited_s = time.monotonic() - self._start_time
        if not self._any_started and self.error is None and waited_s > timeout_s:
            layout = self.spec.trial.layout
            bundle = f"{{CPU: {layout.cpus:g}, GPU: {layout.gpus:g}}}"
            self.error = PlacementError(
                f"no trial was scheduled within {timeout_s:.0f} s: a placement group of {len(layout.stage_blocks)} x "
                f"{bundle} is not available, possibly in use by another job; lower search.trial_stages"
            )
        if (self.error is not None or self._stop.reason is not None) and not self._interrupted:
            self._interrupted = True
            self._interrupt()

    def on_start(self, trial: Any) -> None:
        self._any_started = True
        row = self._save_row(replace(self._row(trial), status="running", status_reason=""))
        self._callback.on_begin(self.result, row)

    def on_result(self, trial: Any, report: Mapping[str, Any]) -> None:
        row = self._row(trial)
        if "infeasible" in report:
            self._save_row(replace(row, status="infeasible", status_reason=str(report["infeasible"])))
        elif "failed" in report:
            self._save_row(replace(row, status="failed", status_reason=str(report["failed"])))
        elif "score" in report:
            depths = {int(depth): float(value) for depth, value in report["depths"].items()}
            epoch, known_epochs = int(report["epoch"]), {score.epoch for score in row.curve}
            row = replace(
                row.with_score(TrialScore(epoch, float(report["score"]), depths)),
                gflops=report["gflops"],
                images_per_s=report.get("images_per_s", row.images_per_s),
            )
            self._save_row(row)
            if epoch not in known_epochs:  # a trial that is continued reports its last score again
                self._callback.on_score(self.result, row)

    def on_complete(self, trial: Any) -> None:
        row = self._row(trial)
        if row.status == "running" and row.epoch >= self.result.epochs:
            row = replace(
                row, status="finished", status_reason=f"trained for all {self.result.epochs} epochs"
            )
        elif row.status == "running":
            factor = self.spec.settings.search.reduction_factor
            rank = "below the median" if factor == 2 else f"not in the top 1/{factor}"
            row = replace(row, status="stopped early", status_reason=f"by ASHA: {rank} at rung {row.epoch}")
        self._finish_trial(trial, row)

    def on_retry(self, trial: Any) -> None:
        """It failed or its process died, and Tune restarts it from its last checkpoint."""
        self._callback.on_retry(self.result, self._save_row(_failed(self._row(trial))))

    def on_error(self, trial: Any) -> None:
        self._finish_trial(trial, _failed(self._row(trial)))

    def _finish_trial(self, trial: Any, row: TrialRow) -> None:
        self._callback.on_end(self.result, self._save_row(row))
        shutil.rmtree(Path(self.spec.trial.folder) / trial.trial_id, ignore_errors=True)
        if row.number == 0 and row.status != "finished":
            self.error = TrainingError(
                f"trial 0 of the search, the baseline config, could not be trained ({row.status}): {row.status_reason}"
            )

    def _row(self, trial: Any) -> TrialRow:
        """The row of a trial; a new one when it is first seen."""
        for row in self.result.rows:
            if row.tune_id == trial.trial_id:
                return row
        changes = decode_config(trial.config)
        return self._save_row(
            TrialRow(len(self.result.rows), changes, tune_id=trial.trial_id, status="waiting")
        )

    def _save_row(self, row: TrialRow) -> TrialRow:
        self.result = self.result.with_row(row)
        save_result(self._out, self.result)
        return row


def _failed(row: TrialRow) -> TrialRow:
    """The row of a trial that ended with an error; without a reported cause its process died."""
    reason = row.status_reason if row.status == "failed" else "its process died, possibly out of memory"
    return replace(row, status="failed", status_reason=reason)
