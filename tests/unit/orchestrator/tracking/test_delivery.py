"""What reaches a store that is slow, away, read-only, full, or refuses something."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from bim.orchestrator.tracking.delivery import Delivery
from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.records import MetricPoint
from bim.orchestrator.tracking.run_writer import UnknownUpload
from bim.orchestrator.tracking.upload_queue import UploadQueue

DOWN = ConnectionError("connection refused")
READ_ONLY = MlflowException("(sqlite3.OperationalError) attempt to write a readonly database", 1)
FULL = MlflowException("(sqlite3.OperationalError) database or disk is full", 1)
SERVER_ERROR = MlflowException("API request failed with error code 500", 1)


class Store:
    """In place of `RunWriter`; takes everything unless an error is set for all, or for one name.

    Args:
        during: called with what is being sent.
    """

    def __init__(self, during: Callable[[str], None] = lambda name: None) -> None:
        self.taken: list[str] = []
        self.requests = 0
        self.error: Exception | None = None
        self.errors: dict[str, Exception] = {}
        self.during = during

    def _request(self, name: str) -> None:
        self.requests += 1
        self.during(name)
        error = self.errors.get(name) or self.error
        if error is not None:
            raise error
        self.taken.append(name)

    def send(self, kind: str, arguments: dict[str, Any]) -> None:
        self._request(arguments["name"])

    def metrics(self, points: Sequence[MetricPoint]) -> None:
        self._request(f"{len(points)} metrics")

    def file(self, path: str) -> None:
        self._request(path)


class Scene:
    """A run that records three uploads, and a metric."""

    def __init__(self, out: Path, store: Store) -> None:
        self.metrics, self.queue, self.store = (
            MetricLog(out / "metrics.jsonl"),
            UploadQueue(out / "uploads"),
            store,
        )
        writer: Any = store
        self.delivery = Delivery(out, self.metrics, self.queue, writer)
        self.metrics.append(1, {"loss": 0.5})
        for name in "abc":
            self.put(name)

    def put(self, name: str, first: bool = False) -> None:
        self.queue.put(name, "tags", {"name": name}, first)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, Store())


def test_metrics_go_before_uploads_and_the_end_of_a_run_before_everything(scene: Scene) -> None:
    scene.put("the end", first=True)
    scene.delivery.send()
    assert scene.store.taken == ["the end", "1 metrics", "a", "b", "c"]
    assert scene.queue.waiting() == []
    assert scene.delivery.num_sent == 5


def test_the_end_of_a_run_does_not_wait_for_what_is_to_be_sent_to_a_slow_store(tmp_path: Path) -> None:
    def ended_by_a_signal(name: str) -> None:
        if name == "a":
            scene.put("the end", first=True)

    scene = Scene(tmp_path, Store(ended_by_a_signal))
    scene.delivery.send()
    assert scene.store.taken == ["1 metrics", "a", "the end", "b", "c"]


@pytest.mark.parametrize("error", [DOWN, READ_ONLY, FULL, SERVER_ERROR], ids=str)
def test_a_store_that_is_unavailable_loses_nothing_and_is_asked_twice_a_round(
    scene: Scene, error: Exception
) -> None:
    scene.store.error = error
    for _ in range(3):
        with pytest.raises(type(error)):
            scene.delivery.send()
    assert scene.store.requests == 6
    assert scene.delivery.num_sent == 0
    scene.store.error = None
    scene.delivery.send()
    assert scene.store.taken == ["1 metrics", "a", "b", "c"]


def test_one_upload_that_fails_does_not_hold_up_the_others(scene: Scene) -> None:
    scene.store.errors["a"] = SERVER_ERROR
    with pytest.raises(MlflowException):
        scene.delivery.send()
    assert scene.store.taken == ["1 metrics", "b", "c"]
    assert [upload.name for upload in scene.queue.waiting()] == ["a"]
    scene.store.errors.clear()
    scene.delivery.send()
    assert scene.store.taken[-1] == "a"


def test_a_row_that_another_run_inserted_at_the_same_time_is_no_outage(tmp_path: Path) -> None:
    def insert(name: str) -> None:
        if name == "b" and scene.store.requests == 3:  # metrics, a, b
            raise MlflowException(
                "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", BAD_REQUEST
            )

    scene = Scene(tmp_path, Store(insert))
    scene.delivery.send()
    assert scene.store.taken == ["1 metrics", "a", "b", "c"]


@pytest.mark.parametrize(
    "error",
    [MlflowException("too long", INVALID_PARAMETER_VALUE), UnknownUpload("'dance' is no kind of upload")],
    ids=str,
)
def test_what_the_store_refuses_is_told_and_dropped(
    scene: Scene, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    scene.store.errors["b"] = error
    scene.delivery.send()
    assert scene.store.taken == ["1 metrics", "a", "c"]
    assert scene.queue.waiting() == []
    assert caplog.messages == [f"MLflow does not take b: {error}"]


def test_a_run_that_the_store_does_not_have_now_may_be_there_later(scene: Scene) -> None:
    scene.store.error = MlflowException("Run 'x' not found", RESOURCE_DOES_NOT_EXIST)
    with pytest.raises(MlflowException):
        scene.delivery.send()
    assert len(scene.queue.waiting()) == 3


def test_a_cancelled_round_ends_before_its_next_upload(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Store(lambda name: scene.delivery.cancel() if name == "a" else None))
    scene.delivery.send()
    assert scene.store.taken == ["1 metrics", "a"]


def test_the_log_of_events_is_sent_at_the_end_and_seldom_before(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    events = tmp_path / "events.log"
    for line in range(3):
        with events.open("a") as file:
            file.write(f"{line}\n")
        scene.delivery.send()
    assert scene.store.taken.count("events.log") == 1
    now += 31
    scene.delivery.send()
    assert scene.store.taken.count("events.log") == 2
    scene.delivery.send(final=True)
    assert scene.store.taken.count("events.log") == 2  # it has not grown


def test_the_end_of_a_run_is_tried_once_more_where_its_own_thread_failed(scene: Scene) -> None:
    scene.put("the end", first=True)
    failed = threading.Event()

    def fail_once(name: str) -> None:
        if name == "the end" and not failed.is_set():
            failed.set()
            raise DOWN

    scene.store.during = fail_once
    scene.delivery.begin_end()
    assert failed.wait(5)
    while scene.delivery._ends:
        time.sleep(0.001)
    scene.delivery.send(final=True)
    assert scene.store.taken == ["the end", "1 metrics", "a", "b", "c"]
    assert scene.queue.waiting() == []
