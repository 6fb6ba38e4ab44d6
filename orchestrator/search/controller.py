"""The controller of a running search: what is tried next, which trial is stopped, and what the record of it says.

It knows numbers of trials and their reports alone; `tuner` connects it with Ray Tune. The record is written before a trial
goes on, and holds every decision with the score that led to it, so a search that is killed at any moment is continued from
the record as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.distributed.placement import PlacementError
from bim.orchestrator.runs.lease import Lease, LeaseLostError
from bim.orchestrator.search.asha import rung_to_stop_at
from bim.orchestrator.search.proposals import Proposer
from bim.orchestrator.search.record import FOLDER, RECORD, save_result
from bim.orchestrator.search.results import SearchResult, TrialRow, TrialScore
from bim.orchestrator.search.spec import SearchSpec
from bim.orchestrator.search.trial import remove_trial_checkpoints, trial_epochs
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

PLACEMENT_TIMEOUT_S = 120.0
"""Seconds without any started trial, after which the search gives up; `placement.wait_s` gives more."""


def grace_period(settings: Settings, epochs: int) -> int:
    """Epochs before the first trial may be stopped: at least those to the first score. epochs: of a trial.

    By default half of them, and the warm-up: features of masked modeling are worse than random ones at first.
    """
    grace = settings.search.grace_epochs
    if grace is None:
        warmup = (
            settings.schedule.warmup_epochs * epochs / settings.schedule.epochs
        )  # as `trial_settings` has it
        grace = max(math.ceil(epochs / 2), math.ceil(warmup))
    return min(max(grace, settings.search.every_epochs), epochs)


def epochs_of_trials(settings: Settings) -> tuple[float, int]:
    """Epochs of all trials together: if ASHA ends what it can at the first rung, and if it ends none."""
    search, epochs = settings.search, trial_epochs(settings)
    grace = grace_period(settings, epochs)
    going_on = math.ceil(search.trials / search.reduction_factor)
    return search.trials * grace + going_on * (epochs - grace), search.trials * epochs


class SearchCallback(Protocol):
    """Receiver of the events of a search; its methods must not raise."""

    def on_begin(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_score(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_retry(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_end(self, result: SearchResult, row: TrialRow) -> None: ...


class SearchController:
    """State of the running search: its record, whether it has to stop, and the cause. Used by one thread.

    Args:
        propose: what the next trial is.
        out: output directory of the run; the record is written below it after every event.
        stop: set to end the search before its last trial; trials that run then are continued later.
        lease: of the output directory; the search ends where it is lost, and writes nothing more.
    """

    def __init__(
        self,
        spec: SearchSpec,
        propose: Proposer,
        out: Path,
        callback: SearchCallback,
        stop: StopRequest,
        lease: Lease | None = None,
    ) -> None:
        self.result = spec.initial
        self.error: Exception | None = None
        """What ended the search, if it is no trial's own failure."""
        self._spec, self._propose, self._out, self._callback, self._stop = spec, propose, out, callback, stop
        self._lease = lease
        self._grace_period = grace_period(spec.settings, spec.initial.epochs)
        self._unfinished = [row.number for row in self.result.rows if not row.is_complete]
        self._start_time, self._any_started = time.monotonic(), False
        for row in self.result.rows:
            if row.is_complete:
                remove_trial_checkpoints(self._spec.trial, str(row.number))

    def next_trial(self) -> TrialRow | None:
        """The trial to start next: first those that an earlier process did not complete. None if there are no more."""
        if self._unfinished:
            return self._save(replace(self.result.rows[self._unfinished.pop(0)], status="waiting"))
        changes = self._propose(self.result)
        if changes is None:
            return None
        return self._save(TrialRow(len(self.result.rows), changes, status="waiting"))

    def should_stop(self) -> bool:
        """Whether all trials have to end now. Called several times a second."""
        spec = self._spec
        self._look_at_lease()
        timeout_s = max(PLACEMENT_TIMEOUT_S, spec.settings.placement.wait_s)
        if not self._any_started and self.error is None and time.monotonic() - self._start_time > timeout_s:
            layout = spec.trial.layout
            bundle = f"{{CPU: {layout.cpus:g}, GPU: {layout.gpus:g}}}"
            self.error = PlacementError(
                f"no trial was scheduled within {timeout_s:.0f} s: a placement group of {len(layout.stage_blocks)} x "
                f"{bundle} is not available, possibly in use by another job; lower search.trial_stages"
            )
        return self.error is not None or self._stop.reason is not None

    def on_start(self, number: int) -> None:
        self._any_started = True
        row = self._save(replace(self.result.rows[number], status="running", status_reason=""))
        self._callback.on_begin(self.result, row)

    def on_report(self, number: int, report: Mapping[str, Any]) -> bool:
        """Record what a trial reports; returns whether it is to be stopped."""
        row = self.result.rows[number]
        if "infeasible" in report:
            self._save(replace(row, status="infeasible", status_reason=str(report["infeasible"])))
        elif "failed" in report:
            self._save(replace(row, status="failed", status_reason=str(report["failed"])))
        elif "score" in report:
            depths = {int(depth): float(value) for depth, value in report["depths"].items()}
            score = TrialScore(int(report["epoch"]), float(report["score"]), depths)
            if score.epoch <= row.epoch:  # a trial that is continued reports its last score again
                return row.is_complete
            row = self._save(
                self._decided(
                    replace(
                        row.with_score(score),
                        gflops=report["gflops"],
                        images_per_s=report.get("images_per_s", row.images_per_s),
                    )
                )
            )
            self._callback.on_score(self.result, row)
        return row.status == "stopped early"

    def on_complete(self, number: int) -> None:
        """Its process has ended in order."""
        row = self.result.rows[number]
        if row.is_complete:
            self._end(row)
        elif not self.should_stop():
            self.on_error(number, "it ended without its last score")

    def on_retry(self, number: int, cause: str) -> None:
        """It failed or its process died, and is started again from its last checkpoint. cause: if it reported none."""
        self._callback.on_retry(self.result, self._save(_failed(self.result.rows[number], cause)))

    def on_error(self, number: int, cause: str) -> None:
        """It failed again. cause: if it reported none."""
        if not self.should_stop():
            self._end(_failed(self.result.rows[number], cause))

    def finish(self) -> SearchResult:
        """The record at the end of the search: finished, unless it was to stop.

        Raises:
            TrainingError: no trial was trained to its end.
            PlacementError: the cluster has no room for a trial.
        """
        if self.error is not None:
            raise self.error
        rows = self.result.rows
        if self._stop.reason is None and rows:
            if not self.result.completed:
                baseline = rows[0]
                raise TrainingError(
                    "no trial of the search was trained to its end; trial 0, the baseline config: "
                    f"{baseline.status}, {baseline.status_reason}; --resume tries those that failed once more, and "
                    "--search.trials 0 trains without a search"
                )
            self.result = replace(self.result, finished=True)
        return self.result

    def _decided(self, row: TrialRow) -> TrialRow:
        """The row with the status that its newest score gives it."""
        search, epochs = self._spec.settings.search, self.result.epochs
        if row.epoch >= epochs:
            return replace(row, status="finished", status_reason=f"trained for all {epochs} epochs")
        if row.number == 0:  # the baseline is what others are compared with
            return row
        others = [other for other in self.result.rows if other.number != row.number]
        rung = rung_to_stop_at(row, others, self._grace_period, epochs, search.reduction_factor)
        if rung is None:
            return row
        factor = search.reduction_factor
        rank = "below the median" if factor == 2 else f"not in the top 1/{factor}"
        return replace(row, status="stopped early", status_reason=f"by ASHA: {rank} at rung {rung}")

    def _end(self, row: TrialRow) -> None:
        self._callback.on_end(self.result, self._save(row))
        if self.error is None:
            remove_trial_checkpoints(self._spec.trial, str(row.number))

    def _look_at_lease(self) -> None:
        try:
            if self._lease is not None:
                self._lease.raise_if_lost()
        except LeaseLostError as error:
            self.error = self.error or error

    def _save(self, row: TrialRow) -> TrialRow:
        self.result = self.result.with_row(row)
        self._look_at_lease()
        if isinstance(self.error, LeaseLostError):
            return row
        try:
            save_result(self._out, self.result)
        except OSError as error:
            self.error = self.error or TrainingError(
                f"the search cannot go on: {self._out / FOLDER / RECORD} cannot be written ({error.strerror}); "
                "--resume continues it"
            )
        return row


def _failed(row: TrialRow, cause: str) -> TrialRow:
    reason = row.status_reason if row.status == "failed" and row.status_reason else cause
    return replace(row, status="failed", status_reason=reason)
