"""The trials of a search in MLflow: a child run for each, with its settings, its scores over the epochs and its end.

Part of `tracker.py`. Every method may raise and may be repeated: existing runs are used again.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from bim.orchestrator.tracking.variant_runs import DESCRIPTION_TAG, last_steps, source_tags

if TYPE_CHECKING:
    from bim.orchestrator.search.results import TrialRow

CUT_OFF = "cut off; --resume goes on with it"

END_STATUS = {"finished": "FINISHED", "stopped early": "KILLED", "infeasible": "KILLED", "failed": "FAILED"}
"""Status of a trial -> status of its MLflow run."""


class TrialRuns:
    """Writes the trials of one parent run.

    Args:
        client: of the store.
        parent: the run of the search.
    """

    def __init__(self, client: MlflowClient, parent: Run) -> None:
        self._client, self._parent = client, parent

    def send(self, row: TrialRow, metric: str) -> None:
        """Write the present state of one trial; what the store has already stays. metric: the key of its scores."""
        client, run = self._client, self._run(row)
        run_id: str = run.info.run_id
        sent_steps, now = last_steps(client, run), int(1000 * time.time())
        params = [Param(k, json.dumps(value)) for k, value in row.changes.items() if k not in run.data.params]
        if row.status == "running" and run.info.status != "RUNNING":  # retried, or resumed
            client.update_run(run_id, "RUNNING")
        metrics = []
        for point in row.curve:
            values = {"search/score": point.score}
            values |= {f"search/depth{depth:02d}": value for depth, value in point.by_depth.items()}
            values |= {} if row.gflops is None else {"search/gflops_per_image": row.gflops}
            metrics += [
                Metric(name, value, now, point.epoch)
                for name, value in values.items()
                if point.epoch > sent_steps.get(name, -1)
            ]
        if row.images_per_s is not None:
            metrics.append(Metric("search/images_per_s", row.images_per_s, now, row.epoch))
        tags = {"status": row.status, "why": row.status_reason, "score_is": metric}
        tags[DESCRIPTION_TAG] = f"{row.status}: {row.status_reason}" if row.status_reason else row.status
        client.log_batch(
            run_id, metrics=metrics, params=params, tags=[RunTag(k, v[:5000]) for k, v in tags.items()]
        )
        if row.status in END_STATUS:
            client.set_terminated(run_id, END_STATUS[row.status])

    def mark_cut_off(self, row: TrialRow) -> None:
        """End the run of a trial that was still running when the search ended."""
        run_id = self._run(row).info.run_id
        tags = [RunTag("status", "cut off"), RunTag("why", CUT_OFF), RunTag(DESCRIPTION_TAG, CUT_OFF)]
        self._client.log_batch(run_id, tags=tags)
        self._client.set_terminated(run_id, "KILLED")

    def _run(self, row: TrialRow) -> Run:
        client, parent = self._client, self._parent.info
        query = f"tags.mlflow.parentRunId = '{parent.run_id}' and tags.trial = '{row.number}'"
        if runs := client.search_runs([parent.experiment_id], query, max_results=1):
            return runs[0]
        tags = {"mlflow.parentRunId": parent.run_id, "trial": str(row.number), **source_tags()}
        name = f"trial {row.number} of {parent.run_name}"
        return client.create_run(parent.experiment_id, tags=tags, run_name=name)
