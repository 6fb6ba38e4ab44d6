"""The trials of a search in MLflow: a child run for each, with its settings, its scores over the epochs and its end.

MLflow lists child runs by their start, the newest first, and shows ten on a page. The runs of the depths exist before the
first trial; for them to stand above the trials, the run of a trial starts with that of the search. The tag `started_at` has
the time at which the trial began, and the duration of its run counts from there.

Part of `tracker.py`. Every method may raise and may be repeated: existing runs are used again.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from bim.orchestrator.tracking.records import StoredRun
from bim.orchestrator.tracking.variant_runs import DESCRIPTION_TAG, source_tags

if TYPE_CHECKING:
    from bim.orchestrator.search.results import TrialRow

CUT_OFF = "cut off; --resume goes on with it"

STARTED_TAG = "started_at"
"""Tag of a trial with the time at which it began, in ISO 8601."""

MAX_LISTED = 999
"""Trials that MLflow lists by their number: as many as there are milliseconds between the search and its depths."""

END_STATUS = {"finished": "FINISHED", "stopped early": "FINISHED", "infeasible": "KILLED", "failed": "FAILED"}
"""Status of a trial -> status of its MLflow run, which shows KILLED and FAILED as errors; the tag `status` has the first."""


class TrialRuns:
    """Writes the trials of one parent run.

    Args:
        client: of the store.
        parent: the run of the search.
    """

    def __init__(self, client: MlflowClient, parent: StoredRun) -> None:
        self._client, self._parent = client, parent
        self._sent: dict[int, _SentTrial] = {}
        self._locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)

    def send(self, row: TrialRow, metric: str, cut_off: bool = False) -> None:
        """Write the present state of one trial; what the store has already stays. Threads may share it.

        Args:
            metric: the key of its scores.
            cut_off: whether the search has ended before this trial, which `--resume` continues.
        """
        with self._locks[row.number]:
            self._send(row, metric, cut_off)

    def _send(self, row: TrialRow, metric: str, cut_off: bool) -> None:
        sent = self._sent.get(row.number)
        if sent is None:
            sent = self._sent[row.number] = self._open(row)
        status = "KILLED" if cut_off else END_STATUS.get(row.status, "RUNNING")
        if status != sent.status:  # first of all: it takes one request, and the process may be about to end
            if status == "RUNNING":  # retried, or resumed
                self._client.update_run(sent.run_id, status)
            else:
                self._client.set_terminated(sent.run_id, status, end_time(sent.start, sent.started_at))
            sent.status = status
        now = int(1000 * time.time())
        params = [Param(key, json.dumps(value)) for key, value in row.changes.items() if not sent.has_params]
        metrics = []
        for point in row.curve:
            values = {"search/score": point.score}
            values |= {f"search/depth{depth:02d}": value for depth, value in point.by_depth.items()}
            values |= {} if row.gflops is None else {"search/gflops_per_image": row.gflops}
            values |= {} if row.images_per_s is None else {"search/images_per_s": row.images_per_s}
            if point.epoch > sent.epoch:
                metrics += [Metric(name, value, now, point.epoch) for name, value in values.items()]
        tags = {"score_is": metric, **_status_tags(row.status, row.status_reason)}
        if cut_off:
            tags |= _status_tags("cut off", CUT_OFF)
        self._client.log_batch(sent.run_id, metrics=metrics, params=params, tags=_run_tags(tags))
        sent.epoch, sent.has_params = row.epoch, True

    def cut_off(self, run: Run) -> None:
        """End a run that a process left running when it was killed."""
        run_id = run.info.run_id
        self._client.set_terminated(run_id, "KILLED", end_time(run.info.start_time, _started_at(run)))
        self._client.log_batch(run_id, tags=_run_tags(_status_tags("cut off", CUT_OFF)))

    def _open(self, row: TrialRow) -> _SentTrial:
        """The run of a trial, created if there is none, with what earlier processes have sent of it."""
        client, parent = self._client, self._parent
        query = f"tags.mlflow.parentRunId = '{parent.run_id}' and tags.trial = '{row.number}'"
        if runs := client.search_runs([parent.experiment_id], query, max_results=1):
            (run,) = runs
            name = "search/score"
            scores = client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []
            epoch = max((score.step for score in scores), default=0)
            return _SentTrial(
                run.info.run_id,
                run.info.status,
                epoch,
                bool(run.data.params),
                run.info.start_time,
                _started_at(run),
            )
        now = datetime.now(UTC)
        # A record of an earlier version does not have the start of its run.
        start = (parent.start_time or int(1000 * now.timestamp())) + min(row.number, MAX_LISTED)
        tags = {
            "mlflow.parentRunId": parent.run_id,
            "trial": str(row.number),
            STARTED_TAG: now.isoformat(" ", "seconds"),
            **source_tags(),
        }
        name = f"trial {row.number} of {parent.name}"
        run = client.create_run(parent.experiment_id, start, tags, name)
        return _SentTrial(run.info.run_id, "RUNNING", 0, False, start, _started_at(run))


@dataclass
class _SentTrial:
    """What the store has of a trial.

    Args:
        epoch: of the last score.
        start: of its run, Unix time in milliseconds.
        started_at: when it began, likewise.
    """

    run_id: str
    status: str
    epoch: int
    has_params: bool
    start: int
    started_at: int


def end_time(start: int, started_at: int) -> int:
    """The end that gives the run of a trial that ends now the duration of the trial. Unix times in milliseconds."""
    return int(1000 * time.time()) - (started_at - start)


def _started_at(run: Run) -> int:
    """When a trial began, Unix time in milliseconds: that of its run where an earlier version has written it."""
    with contextlib.suppress(KeyError, ValueError):
        return int(1000 * datetime.fromisoformat(run.data.tags[STARTED_TAG]).timestamp())
    return int(run.info.start_time)


def _status_tags(status: str, reason: str) -> dict[str, str]:
    return {
        "status": status,
        "status_reason": reason,
        DESCRIPTION_TAG: f"{status}: {reason}" if reason else status,
    }


def _run_tags(tags: dict[str, str]) -> list[RunTag]:
    return [RunTag(key, value[:5000]) for key, value in tags.items()]
