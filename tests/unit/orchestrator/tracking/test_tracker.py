"""A run whose store is slow, down, restarted, read-only or full: it starts, goes on, is resumed, and is delivered later."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from bim.orchestrator.runs.lease import LeaseLostError, acquire
from bim.orchestrator.search.results import TrialRow, TrialScore
from bim.orchestrator.tracking.store import TrackingError
from bim.orchestrator.tracking.sync import StoreUnavailableError, recorded_folders, sync_run
from bim.orchestrator.tracking.tracker import Tracker
from bim.pipelines import sync_tracking
from tests.unit.orchestrator.tracking.fake_mlflow import URI, FakeStore, opened

DOWN = ConnectionError("connection refused")
READ_ONLY = MlflowException("(sqlite3.OperationalError) attempt to write a readonly database", 1)
ROW = TrialRow(3, {"mask.ratio": 0.6}, "running", gflops=0.5)


def scored(row: TrialRow, *epochs: int) -> TrialRow:
    for epoch in epochs:
        row = row.with_score(TrialScore(epoch, epoch / 10, {2: epoch / 10}))
    return row


def record_everything(tracker: Tracker) -> None:
    """What a run with a search tells its tracker, but for models."""
    tracker.log_settings({"a": 1}, "a: 1\n")
    tracker.log_metrics(1, {"loss": 0.5})
    tracker.log_trial(ROW, "knn_top1")
    tracker.log_trial(scored(ROW, 2, 4), "knn_top1")
    (tracker.out / "summary.csv").write_text("depth\n")
    tracker.log_file(tracker.out / "summary.csv")
    tracker.set_tags({"b": 2})
    tracker.describe("# note")


def everything_is_there(store: FakeStore, run_id: str = "run0") -> bool:
    run = store.runs[run_id]
    trial = store.child(trial="3")
    return (
        run.data.params == {"a": "1"}
        and run.data.points == [("loss", 1, 0.5)]
        and run.data.tags["b"] == "2"
        and run.data.tags["mlflow.note.content"].startswith("# note")
        and [point[:2] for point in trial.data.points if point[0] == "search/score"]
        == [("search/score", 2), ("search/score", 4)]
        and {"settings.yaml", "summary.csv"} <= set(store.artifacts)
    )


def test_after_the_start_only_the_thread_of_uploads_asks_the_store(tmp_path: Path, store: FakeStore) -> None:
    with opened(tmp_path / "out") as tracker:
        at_start = len(store.requests)
        record_everything(tracker)
    threads = {thread for _, thread in store.requests[at_start:]}
    assert all(thread.startswith(("mlflow-upload", "mlflow-end-")) for thread in threads), threads
    assert everything_is_there(store)
    assert store.runs["run0"].info.status == "FINISHED"
    assert not (tmp_path / "out" / "uploads").exists()


def test_a_slow_store_makes_nobody_wait_but_the_end(tmp_path: Path, store: FakeStore) -> None:
    answers = threading.Semaphore(0)
    tracker = opened(tmp_path / "out")
    store.before = lambda name: answers.acquire() and None
    record_everything(tracker)  # would hang here
    for epochs in ((2, 4, 6), (2, 4, 6, 8)):
        tracker.log_trial(scored(ROW, *epochs), "knn_top1")
    tracker.log_trial(scored(ROW, 2, 4), "knn_top1")
    answers.release(1000)
    assert tracker.finish()
    assert everything_is_there(store)


def test_a_process_that_is_told_to_stop_ends_its_runs_in_the_time_of_one_slow_request(
    tmp_path: Path, store: FakeStore
) -> None:
    """Of every thread that asks, the store answers one request; the thread of uploads waits for its first one."""
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.log_trial(ROW, "knn_top1")
    tracker.log_trial(replace(ROW, number=4), "knn_top1")
    tracker._uploader._sender.send()
    answered: set[str] = set()

    def answer(name: str) -> None:
        thread = threading.current_thread().name
        if thread in answered or thread == "mlflow-upload":
            threading.Event().wait()
        answered.add(thread)

    store.before = answer
    tracker.log_metrics(1, {"loss": 0.5})
    assert not tracker.finish("KILLED", idle_timeout=0.5, timeout=0.5)
    assert [run.info.status for run in store.runs.values()] == ["KILLED"] * 3


def test_a_score_takes_one_request_once_its_run_is_there(tmp_path: Path, store: FakeStore) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    delivery = tracker._uploader._sender
    tracker.log_trial(scored(ROW, 2), "knn_top1")
    delivery.send()
    before = len(store.requests)
    tracker.log_trial(scored(ROW, 2, 4), "knn_top1")
    delivery.send()
    assert [name for name, _ in store.requests[before:]] == ["log_batch"]
    tracker.finish()


@pytest.mark.parametrize("error", [DOWN, READ_ONLY], ids=str)
def test_a_store_that_is_away_for_the_whole_run_gets_everything_by_sync(
    tmp_path: Path, store: FakeStore, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    out = tmp_path / "out"
    tracker = opened(out)
    store.error = error
    record_everything(tracker)
    assert not tracker.finish("KILLED")
    assert f"sent by: bim sync {out}" in caplog.messages[-1]
    assert (
        "the end of the run, trial 3, the settings, summary.csv, the tags b and 1 more" in caplog.messages[-1]
    )
    with pytest.raises(StoreUnavailableError, match="has not taken everything"):
        sync_run(out)
    store.error = None
    synced = sync_run(out)
    assert synced.status == store.runs["run0"].info.status == "KILLED"
    assert everything_is_there(store)
    assert store.child(trial="3").info.status == "KILLED"
    assert store.child(trial="3").data.tags["status"] == "cut off"
    assert sync_run(out).num_sent == 0
    assert everything_is_there(store)  # nothing twice


def test_a_run_is_resumed_without_its_store_and_delivers_what_both_processes_recorded(
    tmp_path: Path, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    out = tmp_path / "out"
    tracker = opened(out)
    store.error = DOWN
    tracker.log_trial(ROW, "knn_top1")
    tracker.finish("KILLED")
    tracker = opened(out, resume=True)
    assert f"MLflow at {URI} cannot be used (connection refused); the run goes on" in caplog.text
    assert (tracker.run_id, tracker.experiment_id) == ("run0", "1")
    record_everything(tracker)
    store.error = None
    assert tracker.finish()
    assert store.runs["run0"].info.status == "FINISHED"
    assert everything_is_there(store)
    assert store.child(trial="3").info.run_name == "trial 3 of a run"


def test_a_resumed_run_is_shown_as_running_as_soon_as_its_store_is_back(
    tmp_path: Path, store: FakeStore
) -> None:
    out = tmp_path / "out"
    opened(out).finish("KILLED")
    store.error = DOWN
    tracker = opened(out, resume=True)
    reopened = threading.Event()
    store.before = lambda name: reopened.set() if name == "update_run" else None
    store.error = None
    assert reopened.wait(5)
    tracker.finish("FAILED")
    assert store.runs["run0"].info.status == "FAILED"


def test_of_several_runs_all_end_before_one_is_waited_for(tmp_path: Path, store: FakeStore) -> None:
    trackers = [opened(tmp_path / name, interval=3600) for name in "ab"]
    for tracker in trackers:
        tracker.request_end("KILLED")
    assert trackers[1].finish("KILLED")
    assert trackers[0].finish("KILLED")
    assert [run.info.status for run in store.runs.values()] == ["KILLED", "KILLED"]


def test_a_new_run_needs_its_store_and_a_resumed_one_the_store_that_has_it(
    tmp_path: Path, store: FakeStore
) -> None:
    store.error = DOWN
    with pytest.raises(TrackingError, match="cannot be used: connection refused"):
        opened(tmp_path / "a")
    assert not (tmp_path / "a" / "tracking.json").exists()
    store.error = None
    opened(tmp_path / "a").finish("KILLED")
    store.runs.clear()
    with pytest.raises(TrackingError, match="run0 that is to be resumed is not in the MLflow store"):
        opened(tmp_path / "a", resume=True)


def test_a_new_run_of_a_directory_does_not_get_what_was_left_for_another(
    tmp_path: Path, store: FakeStore
) -> None:
    out = tmp_path / "out"
    tracker = opened(out)
    store.error = DOWN
    record_everything(tracker)
    tracker.finish("KILLED")
    store.error = None
    (out / "tracking.json").unlink()
    opened(out).finish()
    assert store.runs["run1"].data.tags.keys() & {"b"} == set()
    assert store.runs["run1"].data.points == [("loss", 1, 0.5)]


def test_a_run_that_cannot_write_its_record_does_not_go_on_running_in_the_store(
    tmp_path: Path, store: FakeStore
) -> None:
    with pytest.raises(OSError, match="missing"):
        Tracker.open(URI, "bim", "a run", tmp_path / "missing" / "out")
    assert store.runs["run0"].info.status == "FAILED"


@pytest.mark.parametrize(
    "content",
    [
        *["", "{", "null", "[]", '{"run_id": 3}', '{"run_id": "", "uri": ""}', b"\xff", None],
        '{"run_id": "a", "experiment_id": "1", "uri": "b", "start_time": Infinity}',
    ],
)
def test_a_record_of_any_content_is_a_sentence(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "tracking.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrackingError, match=r"tracking.json, which names the MLflow run .* cannot be read"):
        Tracker.recorded_run(tmp_path)


def test_the_record_has_no_password_and_an_absolute_path(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, uri, recorded in (
        ("a", "http://me:secret@store:5000", "http://***@store:5000"),
        ("b", "sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
    ):
        (tmp_path / name).mkdir()
        Tracker.open(uri, "bim", "a run", tmp_path / name).finish()
        assert json.loads((tmp_path / name / "tracking.json").read_text())["uri"] == recorded
    with pytest.raises(TrackingError, match=r"give --tracking.uri or set MLFLOW_TRACKING_URI"):
        sync_run(tmp_path / "a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@store:5000")
    assert sync_run(tmp_path / "a").status == "FINISHED"


# -- bim sync ---------------------------------------------------------------------------------------------------------


def test_sync_closes_a_run_whose_process_was_killed(tmp_path: Path, store: FakeStore) -> None:
    out = tmp_path / "out"
    tracker = opened(out, interval=3600)
    tracker.log_trial(ROW, "knn_top1")
    tracker._uploader._sender.send()
    tracker._uploader._closing.set()  # as if by SIGKILL: nothing is ended
    tracker._resources.close()
    assert sync_run(out).status == "KILLED"
    assert [run.info.status for run in store.runs.values()] == ["KILLED", "KILLED"]


def test_sync_takes_the_backbones_below_a_comparison(
    tmp_path: Path, store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("", "vit", "swin"):
        (tmp_path / "out" / name).mkdir()
        opened(tmp_path / "out" / name).finish()
    (tmp_path / "out" / "pictures").mkdir()
    assert [folder.name for folder in recorded_folders(tmp_path / "out")] == ["out", "swin", "vit"]
    store.error = DOWN
    assert sync_tracking.main([str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("has not taken everything (connection refused)") == 3
    store.error = None
    assert sync_tracking.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("nothing was left; the run is FINISHED") == 3


def test_sync_leaves_a_run_alone_that_is_alive(
    tmp_path: Path, store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path / "out").finish()
    asked = len(store.requests)
    with acquire(tmp_path / "out", "run"):
        assert sync_tracking.main([str(tmp_path / "out")]) == 2
    assert "a run that is alive sends what it records itself" in capsys.readouterr().err
    assert len(store.requests) == asked
    assert sync_tracking.main([str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "lease.json").exists()


@pytest.mark.parametrize("argv", [["missing"], ["."]], ids=str)
def test_sync_of_what_is_no_run_is_bad_input(
    tmp_path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sync_tracking.main(argv) == 2
    assert "is no output directory of a run: it has no tracking.json" in capsys.readouterr().err


def test_the_state_of_a_trial_that_ended_is_the_status_of_its_run(tmp_path: Path, store: FakeStore) -> None:
    with opened(tmp_path / "out") as tracker:
        for number, status in enumerate(("finished", "stopped early", "infeasible", "failed")):
            tracker.log_trial(replace(ROW, number=number, status=status), "rankme")  # type: ignore[arg-type]
    assert [store.child(trial=str(number)).info.status for number in range(4)] == [
        "FINISHED", "FINISHED", "KILLED", "FAILED",
    ]  # fmt: skip


def test_a_run_that_another_process_has_taken_over_is_left_to_it(tmp_path: Path, store: FakeStore) -> None:
    tracker = opened(tmp_path / "out", interval=60)
    tracker.log_metrics(1, {"loss": 0.5})
    at_the_loss = len(store.requests)
    tracker.__exit__(LeaseLostError, LeaseLostError("taken over"), None)
    tracker._uploader._thread.join(5)
    assert len(store.requests) == at_the_loss
    assert store.runs["run0"].info.status == "RUNNING"
    assert not (tmp_path / "out" / "uploads").exists()


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("trial", {"row": {"status": "dancing"}, "metric": "rankme"}),
        ("trial", {"row": None, "metric": "rankme"}),
        ("depth", {"record": {"folder": "x", "pictures": 3}, "model_name": "m", "dataset": None}),
        ("depth", {"record": [], "model_name": "m", "dataset": None}),
    ],
)
def test_an_upload_of_another_form_is_dropped_and_keeps_no_other_waiting(
    tmp_path: Path, store: FakeStore, kind: str, record: dict[str, object]
) -> None:
    with opened(tmp_path / "out", interval=60) as tracker:
        for number in range(3):
            tracker._queue.put(f"damaged {number}", kind, record)
        tracker.log_metrics(1, {"loss": 0.5})
        tracker.set_tags({"b": 2})
        assert tracker.finish()
    assert store.runs["run0"].data.tags["b"] == "2"
