"""MLflow stores that are new, elsewhere, unavailable for a while, or unusable."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from bim.orchestrator.tracking.store import TrackingError
from bim.orchestrator.tracking.sync import sync_run
from bim.orchestrator.tracking.tracker import Tracker
from tests.integration.tracking import export, open_tracker, outage, record, steps, wait_for

pytestmark = pytest.mark.usefixtures("home")


def test_the_default_store_is_where_a_bare_mlflow_ui_looks(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    with open_tracker(tmp_path / "out") as tracker:
        pass
    assert (home / "mlflow.db").exists()
    assert client.get_run(tracker.run_id).info.artifact_uri.startswith(f"{home}/mlruns/")


def test_an_outage_costs_one_line_and_the_store_gets_everything_afterward(
    tmp_path: Path, home: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    out = tmp_path / "out"
    with open_tracker(out, model_name="outage_vit") as tracker:
        tracker.log_metrics(0, {"loss": 0.0})
        with outage(home):
            for step in range(1, 50):
                tracker.log_metrics(step, {"loss": float(step)})
            wait_for(
                lambda: any("does not take what the run records" in message for message in caplog.messages)
            )
            (out / "results.csv").write_text("depth\n2\n")
            tracker.log_file(out / "results.csv")
            tracker.log_depth(record(export(tmp_path / "depth2", 2)))
    assert steps(client, tracker.run_id, "loss") == list(range(50))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 50
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["results.csv"]
    assert len(client.search_model_versions("name = 'outage_vit-depth02'")) == 1
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert not any(message.count("\n") for message in caplog.messages)
    assert sum("does not take what the run records" in message for message in caplog.messages) == 1


def test_a_store_that_never_comes_back_does_not_fail_the_run(
    tmp_path: Path, home: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    tracker = open_tracker(out)
    with outage(home):
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.set_tags({"a": 1})
        assert not tracker.finish()
    assert "has not taken everything (the end of the run, the tags a)" in caplog.messages[-1]
    assert caplog.messages[-1].endswith(f"sent by: bim sync {out}")
    with open_tracker(out, resume=Tracker.recorded_run(out)) as again:
        pass
    assert steps(client, again.run_id, "loss") == [1]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["http", "folder", "file", "nonsense"])
def test_a_store_that_cannot_be_used_is_one_sentence_at_the_start(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.db").write_text("no database " * 1000)
    uri = {
        "http": f"http://127.0.0.1:{unused_port()}",
        "folder": f"file://{tmp_path}/mlruns",
        "file": f"sqlite:///{tmp_path}/notes.db",
        "nonsense": "nonsense://somewhere",
    }[kind]
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker.open(uri, "bim", "run", tmp_path)
    message = str(caught.value)
    assert uri in message
    assert "--tracking.uri" in message
    assert "\n" not in message
    assert time.monotonic() - start < 60  # MLflow's own patience is four minutes
    assert not (tmp_path / "tracking.json").exists()


def test_a_store_that_is_away_does_not_keep_a_run_from_being_resumed_and_is_not_made_anew(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    out = tmp_path / "out"
    open_tracker(out).finish("KILLED")
    with outage(home, leaves_nothing=True):
        tracker = open_tracker(out, resume=Tracker.recorded_run(out))
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.finish("KILLED", idle_timeout=2)
        assert not (home / "mlflow.db").exists()
    assert sync_run(out).status == "KILLED"
    assert steps(client, tracker.run_id, "loss") == [1]


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_store_that_takes_nothing_more_gets_everything_by_sync(
    tmp_path: Path, home: Path, client: MlflowClient, kind: str
) -> None:
    out = tmp_path / "out"
    tracker = open_tracker(out)
    refusing = {
        "read-only": OperationalError("INSERT", {}, Exception("attempt to write a readonly database")),
        "full": OperationalError("INSERT", {}, Exception("database or disk is full")),
    }[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "flush", lambda self, objects=None: raise_(refusing))
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.set_tags({"a": 1})
        assert not tracker.finish("KILLED")
    assert sync_run(out).status == "KILLED"
    assert client.get_run(tracker.run_id).data.tags["a"] == "1"
    assert steps(client, tracker.run_id, "loss") == [1]


def raise_(error: Exception) -> None:
    raise error


def test_a_run_that_is_not_in_the_store_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"0123abcd .*is not in the MLflow store"):
        open_tracker(tmp_path / "out", resume="0123abcd")


def test_a_model_name_that_the_registry_would_refuse_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"the model name 'a/b' has a slash.*--tracking.model_name"):
        open_tracker(tmp_path / "out", model_name="a/b")


@pytest.mark.slow
def test_runs_started_at_once_in_a_new_folder_share_one_new_store(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from bim.orchestrator.tracking.tracker import Tracker
out = Path(sys.argv[1])
out.mkdir()
print("ready", flush=True)
sys.stdin.readline()
Tracker.open(None, "bim", out.name, out).finish()
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, name],
            cwd=tmp_path,
            env=os.environ.copy(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two", "three")
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    ends = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    assert [end[2] for end in ends] == [0, 0, 0], ends
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("bim")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {
        "one",
        "two",
        "three",
    }


def test_the_view_of_an_earlier_version_gets_the_columns_of_this_one(
    tmp_path: Path, client: MlflowClient
) -> None:
    key = "mlflow.sharedViewState.depth-variants"
    experiment = client.create_experiment("old", tags={key: '{"state": "{}"}'})
    Tracker.open(None, "old", "run", tmp_path).finish()
    view = client.get_experiment(experiment).tags[key]
    assert "level_with_best" in view
    Tracker.open(None, "old", "run", tmp_path).finish()
    assert client.get_experiment(experiment).tags[key] == view


def test_a_deleted_experiment_says_how_to_bring_it_back(
    tmp_path: Path, home: Path, client: MlflowClient
) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        Tracker.open(None, "gone", "run", tmp_path)
