"""A run in a real MLflow store (SQLite): settings, metrics, files, its end and its resumption."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bim.orchestrator.runs.provenance import DataRecord, collect
from bim.orchestrator.tracking.tracker import Tracker
from tests.integration.tracking import export, open_tracker, record, steps

pytestmark = pytest.mark.usefixtures("home")


def test_a_run_holds_its_settings_metrics_provenance_and_files(tmp_path: Path, client: MlflowClient) -> None:
    with open_tracker(tmp_path / "out", "digits") as tracker:
        tracker.log_settings({"mask.ratio": 0.75, "blocks": [2, 2]}, "mask:\n  ratio: 0.75\n")
        tracker.log_provenance(collect(DataRecord("digits", "a1b2c3", 1797, 1258, 180, 359, 10)))
        tracker.log_metrics(1, {"block0/loss": 0.5, "data/wait_s": 0.0, "odd name!": 1.0})
        tracker.log_metrics(2, {"block0/loss": float("nan")})
        (tmp_path / "out" / "events.log").write_text("skipped one image\n")
        (tmp_path / "results.csv").write_text("depth,knn\n2,0.9\n")
        tracker.log_file(tmp_path / "results.csv")
        tracker.describe("# read me", ["a"])
        (tmp_path / "a.png").write_bytes(b"png")
        tracker.log_picture(tmp_path / "a.png", "a")
        pages = tracker.ui_pages()
        assert pages.command == "mlflow ui"
        assert pages.run.startswith("http://127.0.0.1:5000/#/experiments/")
        assert "viewStateShareKey=depth-variants" in pages.variants
    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params == {"mask.ratio": "0.75", "blocks": "[2, 2]"}
    assert run.data.metrics["data/wait_s"] == 0.0
    assert run.data.metrics["odd name_"] == 1.0
    assert steps(client, tracker.run_id, "block0/loss") == [1, 2]
    assert run.data.tags["mlflow.note.content"].startswith("# read me\n\n")
    assert (
        f"get-artifact?path=pictures/a.png&run_uuid={tracker.run_id}" in run.data.tags["mlflow.note.content"]
    )
    assert run.data.tags["torch"]
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    files = {file.path for file in client.list_artifacts(tracker.run_id)}
    assert files == {"settings.yaml", "provenance.json", "events.log", "results.csv", "pictures"}


def test_a_resumed_run_is_the_same_run_and_nothing_is_doubled(
    tmp_path: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    folder = export(tmp_path / "depth2", 2)
    with open_tracker(out, model_name="resumed_vit") as first:
        first.log_settings({"a": 1, "data.workers": 4, "resume": False}, "a: 1\n")
        for step in range(6):
            first.log_metrics(step, {"loss": float(step)})
        first.log_depth(record(folder))
    assert Tracker.recorded_run(out) == first.run_id
    with open_tracker(out, resume=Tracker.recorded_run(out), model_name="resumed_vit") as second:
        second.rewind(3)
        assert client.get_run(first.run_id).info.status == "RUNNING"
        second.log_settings({"a": 1, "data.workers": 2, "resume": True}, "a: 1\n")
        for step in range(4, 8):
            second.log_metrics(step, {"loss": float(step)})
        assert second.history("loss") == [(step, float(step)) for step in range(8)]
        second.log_depth(record(folder))
    assert second.run_id == first.run_id
    assert steps(client, first.run_id, "loss") == list(range(8))
    told = [message for message in caplog.messages if message.startswith("resumed with")]
    assert told == ["resumed with data.workers = 2 (MLflow shows 4)"]
    (child,) = client.search_runs([first.experiment_id], f"tags.mlflow.parentRunId = '{first.run_id}'")
    assert len(steps(client, child.info.run_id, "loss")) == 500
    assert len(steps(client, child.info.run_id, "knn_top1")) == 1
    assert len(client.search_logged_models([first.experiment_id], "name = 'resumed_vit-depth02'")) == 1
    assert len(client.search_model_versions("name = 'resumed_vit-depth02'")) == 1


def test_without_its_record_a_run_continues_as_a_new_one_with_all_its_metrics(
    tmp_path: Path, client: MlflowClient
) -> None:
    out = tmp_path / "out"
    with open_tracker(out) as first:
        first.log_metrics(1, {"loss": 1.0})
    (out / "tracking.json").unlink()
    with open_tracker(out, resume=Tracker.recorded_run(out)) as second:
        second.log_metrics(2, {"loss": 2.0})
    assert second.run_id != first.run_id
    assert steps(client, second.run_id, "loss") == [1, 2]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_by_an_exception_has_that_status(
    tmp_path: Path, client: MlflowClient, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), open_tracker(tmp_path / "out") as tracker:
        raise error("stop")
    assert client.get_run(tracker.run_id).info.status == status


def test_nothing_of_the_process_is_left_changed(tmp_path: Path) -> None:
    before = dict(os.environ)
    with open_tracker(tmp_path / "out"):
        assert any(thread.name == "mlflow-upload" for thread in threading.enumerate())
    assert dict(os.environ) == before
    assert not any(thread.name == "mlflow-upload" for thread in threading.enumerate())
