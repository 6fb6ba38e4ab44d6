"""The trials of a search in MLflow: a child run for each, with its settings, its scores over the epochs and its end.

Part of `tracker.py`. Every method may raise and may be repeated: existing runs are used again.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from bim.orchestrator.tracking.records import StoredRun
from bim.orchestrator.tracking.variant_runs import DESCRIPTION_TAG, source_tags

if TYPE_CHECKING:
    from bim.orchestrator.search.results import TrialRow

CUT_OFF = "cut off; --resume goes on with it"

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
                self._client.set_terminated(sent.run_id, status)
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

    def cut_off(self, run_id: str) -> None:
        """End a run that a process left running when it was killed."""
        self._client.set_terminated(run_id, "KILLED")
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
            return _SentTrial(run.info.run_id, run.info.status, epoch, bool(run.data.params))
        tags = {"mlflow.parentRunId": parent.run_id, "trial": str(row.number), **source_tags()}
        run = client.create_run(
            parent.experiment_id, tags=tags, run_name=f"trial {row.number} of {parent.name}"
        )
        return _SentTrial(run.info.run_id, "RUNNING", 0, False)


@dataclass
class _SentTrial:
    """What the store has of a trial.

    Args:
        epoch: of the last score.
    """

    run_id: str
    status: str
    epoch: int
    has_params: bool


def _status_tags(status: str, reason: str) -> dict[str, str]:
    return {
        "status": status,
        "status_reason": reason,
        DESCRIPTION_TAG: f"{status}: {reason}" if reason else status,
    }


def _run_tags(tags: dict[str, str]) -> list[RunTag]:
    return [RunTag(key, value[:5000]) for key, value in tags.items()]
