"""The trials of a search in MLflow: a child run for each, with its settings, its scores over the epochs, and why it ended.

Part of `tracking.py`, which alone uses it. Everything here may raise and may be repeated: what is there is used again.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from bim.orchestrator.tracking.variant_runs import DESCRIPTION_TAG, last_steps, origin

if TYPE_CHECKING:
    from bim.orchestrator.search.results import TrialRow

CUT_OFF = "cut off; --resume goes on with it"

END = {"finished": "FINISHED", "stopped early": "KILLED", "infeasible": "KILLED", "failed": "FAILED"}
"""Status of a trial -> how MLflow's own status says it."""


class TrialRuns:
    """Writes the trials of one parent run.

    Args:
        client: of the store.
        parent: the run that they belong to.
    """

    def __init__(self, client: MlflowClient, parent: Run) -> None:
        self._client, self._parent = client, parent

    def send(self, row: TrialRow, metric: str) -> None:
        """Write what is known of one trial; what the store has of it already stays. metric: what its scores are."""
        client, run = self._client, self._run(row)
        run_id: str = run.info.run_id
        known, there, now = run.data.params, last_steps(client, run), int(1000 * time.time())
        params = [Param(key, json.dumps(value)) for key, value in row.changes.items() if key not in known]
        if row.status == "running" and run.info.status != "RUNNING":  # tried again, or gone on with
            client.update_run(run_id, "RUNNING")
        metrics = []
        for point in row.curve:
            values = {"search/score": point.score}
            values |= {f"search/depth{depth:02d}": value for depth, value in point.by_depth.items()}
            values |= {} if row.gflops is None else {"search/gflops_per_image": row.gflops}
            metrics += [
                Metric(name, value, now, point.epoch)
                for name, value in values.items()
                if point.epoch > there.get(name, -1)
            ]
        if row.images_per_s is not None:
            metrics.append(Metric("search/images_per_s", row.images_per_s, now, row.epoch))
        tags = {"status": row.status, "why": row.status_reason, "score_is": metric}
        tags[DESCRIPTION_TAG] = f"{row.status}: {row.status_reason}" if row.status_reason else row.status
        client.log_batch(
            run_id, metrics=metrics, params=params, tags=[RunTag(k, v[:5000]) for k, v in tags.items()]
        )
        if row.status in END:
            client.set_terminated(run_id, END[row.status])

    def cut_off(self, row: TrialRow) -> None:
        """End the run of a trial that was under way when the search was."""
        run_id = self._run(row).info.run_id
        tags = [RunTag("status", "cut off"), RunTag("why", CUT_OFF), RunTag(DESCRIPTION_TAG, CUT_OFF)]
        self._client.log_batch(run_id, tags=tags)
        self._client.set_terminated(run_id, "KILLED")

    def _run(self, row: TrialRow) -> Run:
        client, parent = self._client, self._parent.info
        mine = f"tags.mlflow.parentRunId = '{parent.run_id}' and tags.trial = '{row.number}'"
        if found := client.search_runs([parent.experiment_id], mine, max_results=1):
            return found[0]
        tags = {"mlflow.parentRunId": parent.run_id, "trial": str(row.number), **origin()}
        return client.create_run(
            parent.experiment_id, tags=tags, run_name=f"trial {row.number} of {parent.run_name}"
        )
