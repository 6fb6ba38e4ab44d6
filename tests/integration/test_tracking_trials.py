"""The trials of a search in a real MLflow store: written piece by piece, more than once, and after an outage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from bim.orchestrator.search.results import TrialRow, TrialScore
from bim.orchestrator.tracking.tracker import Tracker
from tests.integration.tracking import open_tracker, outage, wait_for

pytestmark = pytest.mark.usefixtures("home")


def trials(client: MlflowClient, tracker: Tracker) -> dict[str, Run]:
    query = f"tags.mlflow.parentRunId = '{tracker.run_id}'"
    return {run.data.tags["trial"]: run for run in client.search_runs([tracker.experiment_id], query)}


def status(client: MlflowClient, tracker: Tracker) -> str:
    """Of the only trial; empty if there is none yet."""
    return next((run.info.status for run in trials(client, tracker).values()), "")


ROW = TrialRow(3, {"mask.ratio": 0.6, "schedule.resolution": [[0, 24], [0.5, 32]]}, gflops=0.5)


def at(row: TrialRow, *epochs: int) -> TrialRow:
    for epoch in epochs:
        row = row.with_score(TrialScore(epoch, epoch / 10, {2: epoch / 20, 12: epoch / 10}))
    return row


def test_a_trial_grows_with_its_scores_and_ends_with_its_reason(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out") as tracker:
        tracker.log_trial(ROW, "knn_top1")
        wait_for(lambda: status(client, tracker) == "RUNNING")
        tracker.log_trial(at(ROW, 2), "knn_top1")
        wait_for(lambda: "search/score" in trials(client, tracker)["3"].data.metrics)
        tracker.log_trial(at(ROW, 2, 4), "knn_top1")
        tracker.log_trial(at(ROW, 2, 4), "knn_top1")  # as a search does that is continued
        ended = replace(at(ROW, 2, 4), status="stopped early", status_reason="by ASHA after epoch 4")
        tracker.log_trial(ended, "knn_top1")
    (run,) = trials(client, tracker).values()
    assert run.info.run_name == "trial 3 of a run"
    assert run.info.status == "FINISHED"  # MLflow shows KILLED as an error
    assert run.data.params == {"mask.ratio": "0.6", "schedule.resolution": "[[0, 24], [0.5, 32]]"}
    assert {
        key: run.data.tags[key] for key in ("status", "status_reason", "score_is", "mlflow.note.content")
    } == {
        "status": "stopped early",
        "status_reason": "by ASHA after epoch 4",
        "score_is": "knn_top1",
        "mlflow.note.content": "stopped early: by ASHA after epoch 4",
    }
    for name, values in {
        "search/score": [0.2, 0.4],
        "search/depth02": [0.1, 0.2],
        "search/depth12": [0.2, 0.4],
    }.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == list(zip((2, 4), values, strict=True))
    assert run.data.metrics["search/gflops_per_image"] == 0.5


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", "FINISHED"), ("failed", "FAILED"), ("infeasible", "KILLED")]
)
def test_the_end_of_a_trial_is_the_status_of_its_run(
    tmp_path: Path, client: MlflowClient, status: str, expected: str
) -> None:
    with open_tracker(tmp_path / "out") as tracker:
        tracker.log_trial(replace(ROW, status=status, status_reason="so"), "rankme")  # type: ignore[arg-type]
    assert trials(client, tracker)["3"].info.status == expected


def test_a_trial_that_the_end_of_the_search_cut_off_does_not_go_on_running(
    tmp_path: Path, client: MlflowClient
) -> None:
    with open_tracker(tmp_path / "out") as tracker:
        tracker.log_trial(at(replace(ROW, status="running"), 2), "knn_top1")
        tracker.finish("KILLED")
    (run,) = trials(client, tracker).values()
    assert run.info.status == "KILLED"
    assert run.data.tags["status_reason"] == "cut off; --resume goes on with it"
    with open_tracker(tmp_path / "out", resume=Tracker.recorded_run(tmp_path / "out")) as tracker:
        tracker.log_trial(at(replace(ROW, status="running"), 2, 4), "knn_top1")
        wait_for(lambda: status(client, tracker) == "RUNNING")
        (run,) = trials(client, tracker).values()
        wait_for(lambda: trials(client, tracker)["3"].data.tags["status_reason"] == "")
        tracker.log_trial(at(replace(ROW, status="finished", status_reason="all"), 2, 4), "knn_top1")
    (run,) = trials(client, tracker).values()
    assert run.info.status == "FINISHED"


def test_what_an_outage_kept_of_a_trial_is_uploaded_at_the_end_and_once(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    with open_tracker(tmp_path / "out") as tracker:
        tracker.log_trial(ROW, "knn_top1")
        wait_for(lambda: status(client, tracker) == "RUNNING")
        with outage(home):
            for epochs in ((2,), (2, 4), (2, 4, 6)):
                tracker.log_trial(at(ROW, *epochs), "knn_top1")
    (run,) = trials(client, tracker).values()
    assert [p.step for p in client.get_metric_history(run.info.run_id, "search/score")] == [2, 4, 6]
