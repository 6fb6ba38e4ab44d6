"""The running search: what Tune's events mean for its record, its listener, and whether it goes on.

Tune's trials are known here by their `trial_id` and `config` alone; no Ray. Serves `search.py`.
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
from bim.orchestrator.search.space import Space, decoded
from bim.orchestrator.search.trial import TrialSpec
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError

PLACEMENT_TIMEOUT_S = 120.0
"""Seconds without a trial having begun, after which the cluster is taken for full."""


@dataclass(frozen=True)
class SearchSpec:
    """A search that is ready to begin.

    Args:
        settings: the recipe; `space` and `own` are what is searched of it.
        plan: what every trial shares.
        empty: the record of this search before its first trial.
    """

    settings: Settings
    space: Space
    plan: TrialSpec
    empty: SearchResult

    @property
    def grace(self) -> int:
        """Epochs before the first trial may be stopped: at least those to the first score.

        ASHA puts a score that comes late for an epoch into the place of an earlier one, beside scores of other epochs.
        """
        return grace_of(self.settings, self.empty.epochs)


def grace_of(settings: Settings, epochs: int) -> int:
    """See `SearchSpec.grace`; epochs: of a trial.

    Half of them where the settings are silent, and the warm-up: masked modelling is worse than random features at first.
    """
    given = settings.search.grace_epochs
    if given is None:
        given = max(math.ceil(epochs / 2), math.ceil(settings.schedule.warmup_epochs))
    return min(max(given, settings.search.every_epochs), epochs)


class SearchCallback(Protocol):
    """Who hears of the search; nothing it does may raise."""

    def on_begin(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_score(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_retry(self, result: SearchResult, row: TrialRow) -> None: ...

    def on_end(self, result: SearchResult, row: TrialRow) -> None: ...


class SearchController:
    """What the running search knows: its record, whether it is to end, and why.

    Args:
        out: of the run; the record is written below it after every event.
        end: called once when the search is to end before its last trial.
    """

    def __init__(
        self,
        spec: SearchSpec,
        out: Path,
        listener: SearchCallback,
        stop: StopRequest,
        end: Callable[[], None],
    ) -> None:
        self.spec, self._out, self._listener, self._stop = spec, out, listener, stop
        self._end = end
        self.result = spec.empty
        self.error: Exception | None = None
        self._began = time.monotonic()
        self._ending = self._anything = False

    def settled(self) -> dict[str, dict[str, Any]]:
        """The last report of every trial that is over, by Tune's name; those that failed may be tried again."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.result.rows:
            if row.status == "infeasible":
                found[row.tune_id] = {"infeasible": row.why}
            elif row.status in ("finished", "stopped early"):
                last = row.curve[-1]
                depths = {str(depth): value for depth, value in last.by_depth.items()}
                found[row.tune_id] = {
                    "epoch": last.epoch,
                    "score": last.score,
                    "depths": depths,
                    "gflops": row.gflops,
                }
        return found

    def on_step(self, trials: Sequence[Any]) -> None:
        """Called some times a second, in the driver's main thread."""
        for trial in trials:
            self._row(trial)
        wait = max(PLACEMENT_TIMEOUT_S, self.spec.settings.placement.wait_s)
        if not self._anything and self.error is None and time.monotonic() - self._began > wait:
            layout = self.spec.plan.layout
            self.error = PlacementError(
                f"no room for a trial of {len(layout.stage_blocks)} stages of {layout.cpus:g} CPU and {layout.gpus:g} GPU "
                f"within {wait:.0f} s: the cluster is perhaps in use by another job; lower search.trial_stages"
            )
        if (self.error is not None or self._stop.reason is not None) and not self._ending:
            self._ending = True
            self._end()

    def on_start(self, trial: Any) -> None:
        self._anything = True
        row = self._keep(replace(self._row(trial), status="running", why=""))
        self._listener.on_begin(self.result, row)

    def on_result(self, trial: Any, result: Mapping[str, Any]) -> None:
        row = self._row(trial)
        if "infeasible" in result:
            self._keep(replace(row, status="infeasible", why=str(result["infeasible"])))
        elif "failed" in result:
            self._keep(replace(row, status="failed", why=str(result["failed"])))
        elif "score" in result:
            depths = {int(depth): float(value) for depth, value in result["depths"].items()}
            epoch, known = int(result["epoch"]), {point.epoch for point in row.curve}
            row = row.with_point(TrialScore(epoch, float(result["score"]), depths))
            row = replace(
                row, gflops=result["gflops"], images_per_s=result.get("images_per_s", row.images_per_s)
            )
            self._keep(row)
            if epoch not in known:  # a trial that goes on tells its last score again
                self._listener.on_score(self.result, row)

    def on_complete(self, trial: Any) -> None:
        row = self._row(trial)
        if row.status == "running" and row.epoch >= self.result.epochs:
            row = replace(row, status="finished", why=f"trained for all {self.result.epochs} epochs")
        elif row.status == "running":
            share = self.spec.settings.search.reduction_factor
            best = "better half" if share == 2 else f"best 1/{share}"
            why = f"by ASHA after epoch {row.epoch}: not in the {best} of those that came so far"
            row = replace(row, status="stopped early", why=why)
        self._over(trial, row)

    def on_retry(self, trial: Any) -> None:
        """It failed or died, and begins again from its last checkpoint."""
        self._listener.on_retry(self.result, self._keep(_failed(self._row(trial))))

    def on_error(self, trial: Any) -> None:
        self._over(trial, _failed(self._row(trial)))

    def _over(self, trial: Any, row: TrialRow) -> None:
        self._listener.on_end(self.result, self._keep(row))
        shutil.rmtree(Path(self.spec.plan.folder) / trial.trial_id, ignore_errors=True)
        if row.number == 0 and row.status != "finished":
            self.error = TrainingError(
                f"trial 0 of the search, the recipe's own setting, could not be trained ({row.status}): {row.why}"
            )

    def _row(self, trial: Any) -> TrialRow:
        for row in self.result.rows:
            if row.tune_id == trial.trial_id:
                return row
        changes = {key: decoded(v) if isinstance(v, str) else v for key, v in trial.config.items()}
        return self._keep(TrialRow(len(self.result.rows), changes, tune_id=trial.trial_id, status="waiting"))

    def _keep(self, row: TrialRow) -> TrialRow:
        self.result = self.result.with_row(row)
        save_result(self._out, self.result)
        return row


def _failed(row: TrialRow) -> TrialRow:
    """A trial that ended with an error; one that could not say which has lost its process."""
    why = row.why if row.status == "failed" else "its process died, perhaps for want of memory"
    return replace(row, status="failed", why=why)
