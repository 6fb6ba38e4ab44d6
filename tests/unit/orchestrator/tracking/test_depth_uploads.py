"""The runs of the depths from the start of the training: created, continued, and ended with their process."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bim.orchestrator.search.results import TrialRow
from bim.orchestrator.tracking.sync import sync_run
from bim.orchestrator.tracking.tracker import Status, Tracker
from tests.unit.orchestrator.tracking.fake_mlflow import FakeStore, opened

DOWN = ConnectionError("connection refused")
PARAMS = {3: {"depth": 3, "mask_ratio": 0.6}, 6: {"depth": 6, "mask_ratio": 0.75}}


def send(tracker: Tracker) -> None:
    tracker._uploader._sender.send()


def statuses(store: FakeStore) -> list[str]:
    """Of the depths, by depth."""
    return [store.child(variant=f"depth{depth}").info.status for depth in PARAMS]


def leave(tracker: Tracker) -> None:
    """End the threads of a tracker as SIGKILL would: nothing is sent."""
    tracker._uploader.abandon()
    tracker._uploader._thread.join()
    tracker._resources.close()


def test_depths_are_running_children_with_their_parameters_and_curves(
    tmp_path: Path, store: FakeStore
) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.begin_depths({6: {"depth": 6}}, "mae")
    tracker.log_depth_metrics(10, {3: {"val/knn_top1": 0.4}, 6: {"val/knn_top1": 0.5}})
    tracker.log_depth_metrics(20, {3: {"val/knn_top1": 0.6}, 6: {"val/knn_top1": 0.7}})
    send(tracker)
    shallow, deep, baseline = (store.child(variant=name) for name in ("depth3", "depth6", "mae-depth6"))
    assert (shallow.info.run_name, shallow.info.status) == ("depth 3 of a run", "RUNNING")
    assert shallow.data.tags["mlflow.parentRunId"] == "run0"
    assert shallow.data.params == {"depth": "3", "mask_ratio": "0.6"}
    assert deep.data.points == [("val/knn_top1", 10, 0.5), ("val/knn_top1", 20, 0.7)]
    assert baseline.info.start_time < shallow.info.start_time < deep.info.start_time
    leave(tracker)


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "FINISHED"])
def test_no_depth_runs_on_when_its_process_has_ended(
    tmp_path: Path, store: FakeStore, status: Status
) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    send(tracker)
    tracker.finish(status)
    assert statuses(store) == [status] * 2


def test_depths_that_the_store_has_not_taken_at_the_end_do_not_begin_after_it(
    tmp_path: Path, store: FakeStore
) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.finish("KILLED")
    assert statuses(store) == ["KILLED"] * 2
    assert store.child(variant="depth6").data.params["mask_ratio"] == "0.75"


def test_a_depth_that_begins_while_its_run_ends_is_ended(tmp_path: Path, store: FakeStore) -> None:
    """The store takes the end of depth 3 between two requests of its beginning."""
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    writer = tracker._writer

    def end_once(name: str) -> None:
        if name == "log_batch":
            store.before = lambda name: None
            end = threading.Thread(target=writer.end_depth, args=("", 3, "KILLED", 2**50))
            end.start()
            end.join()

    store.before = end_once
    send(tracker)
    assert statuses(store) == ["KILLED", "RUNNING"]
    leave(tracker)


def test_a_resumed_run_goes_on_with_the_same_depths_and_repeats_no_value(
    tmp_path: Path, store: FakeStore
) -> None:
    out = tmp_path / "out"
    tracker = opened(out, interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.log_depth_metrics(10, {3: {"val/knn_top1": 0.4}})
    tracker.finish("KILLED")
    tracker = opened(out, resume=True, interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.log_depth_metrics(10, {3: {"val/knn_top1": 0.4}})
    tracker.log_depth_metrics(20, {3: {"val/knn_top1": 0.6}})
    send(tracker)
    send(tracker)
    assert statuses(store) == ["RUNNING"] * 2
    assert store.child(variant="depth3").data.points == [("val/knn_top1", 10, 0.4), ("val/knn_top1", 20, 0.6)]
    tracker.finish("FAILED")
    assert statuses(store) == ["FAILED"] * 2


def test_the_end_of_an_earlier_process_does_not_end_depths_that_go_on(
    tmp_path: Path, store: FakeStore
) -> None:
    out = tmp_path / "out"
    tracker = opened(out, interval=3600)
    tracker.begin_depths(PARAMS)
    send(tracker)
    store.error = DOWN
    tracker.finish("KILLED", idle_timeout=0.2, timeout=0.2)
    assert statuses(store) == ["RUNNING"] * 2
    tracker = opened(out, resume=True, interval=3600)
    store.error = None
    tracker.begin_depths(PARAMS)
    send(tracker)
    assert statuses(store) == ["RUNNING"] * 2
    tracker.finish("KILLED")
    assert statuses(store) == ["KILLED"] * 2


def test_a_resumed_process_that_ends_before_it_trains_ends_the_depths_of_one_that_was_killed(
    tmp_path: Path, store: FakeStore
) -> None:
    out = tmp_path / "out"
    tracker = opened(out, interval=3600)
    tracker.begin_depths(PARAMS)
    send(tracker)
    leave(tracker)
    opened(out, resume=True, interval=3600).finish("FAILED")
    assert statuses(store) == ["KILLED"] * 2


def test_sync_delivers_the_depths_of_a_run_whose_store_was_away(tmp_path: Path, store: FakeStore) -> None:
    out = tmp_path / "out"
    tracker = opened(out, interval=3600)
    store.error = DOWN
    tracker.begin_depths(PARAMS)
    tracker.log_depth_metrics(10, {3: {"val/knn_top1": 0.4}})
    assert not tracker.finish("FAILED", idle_timeout=0.2, timeout=0.2)
    store.error = None
    sync_run(out)
    assert statuses(store) == ["FAILED"] * 2
    assert store.child(variant="depth3").data.points == [("val/knn_top1", 10, 0.4)]
    assert store.child(variant="depth6").data.params["mask_ratio"] == "0.75"


def test_an_exit_that_cannot_wait_ends_the_depths_too(tmp_path: Path, store: FakeStore) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    send(tracker)
    tracker.end_at_once()
    assert statuses(store) == ["KILLED"] * 2
    leave(tracker)


TRIAL = TrialRow(0, {"mask.ratio": 0.6})


def test_parameters_that_a_search_chooses_come_with_its_end(tmp_path: Path, store: FakeStore) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths({3: {"depth": 3}, 6: {"depth": 6}})
    send(tracker)
    assert store.child(variant="depth3").data.params == {"depth": "3"}
    tracker.begin_depths(PARAMS)
    send(tracker)
    assert store.child(variant="depth3").data.params == {"depth": "3", "mask_ratio": "0.6"}
    assert statuses(store) == ["RUNNING"] * 2
    leave(tracker)


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_depths_that_wait_for_a_search_end_with_it(tmp_path: Path, store: FakeStore, status: Status) -> None:
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.log_trial(TRIAL, "knn_top1")
    send(tracker)
    tracker.finish(status)
    assert statuses(store) == [status] * 2
    assert store.child(trial="0").info.status == "KILLED"  # it was cut off, and did not fail


def test_depths_that_begin_before_the_trials_stand_above_them_and_trials_keep_their_durations(
    tmp_path: Path, store: FakeStore
) -> None:
    """MLflow lists child runs by their start, the newest first."""
    tracker = opened(tmp_path / "out", interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.begin_depths({6: {"depth": 6}}, "mae")
    send(tracker)
    ended = replace(TRIAL, status="finished")
    for number in (0, 1, 5000):
        tracker.log_trial(replace(TRIAL, number=number), "knn_top1")
        send(tracker)
        tracker.log_trial(replace(ended, number=number), "knn_top1")
        send(tracker)
    trials = [store.child(trial=str(number)).info for number in (0, 1, 5000)]
    starts = [info.start_time for info in trials]
    assert starts == sorted(set(starts))
    depths = [store.child(variant=name).info for name in ("depth3", "depth6", "mae-depth6")]
    assert max(starts) < min(info.start_time for info in depths)
    for info in trials:
        assert 0 <= info.end_time - info.start_time < 10_000
    leave(tracker)


def test_a_resumed_process_ends_the_trials_that_one_left_running_that_was_killed(
    tmp_path: Path, store: FakeStore
) -> None:
    out = tmp_path / "out"
    tracker = opened(out, interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.log_trial(TRIAL, "knn_top1")
    send(tracker)
    leave(tracker)
    tracker = opened(out, resume=True, interval=3600)
    tracker.begin_depths(PARAMS)
    tracker.finish("FAILED")
    assert statuses(store) == ["FAILED"] * 2
    assert store.child(trial="0").info.status == "KILLED"
