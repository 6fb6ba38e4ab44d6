"""Upload to a store that may be slow, unavailable, or available again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from bim.orchestrator.tracking.background_upload import BackgroundUploader, RetryQueue
from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.records import MetricPoint


class Store:
    """Takes points, unless it is unavailable."""

    def __init__(self) -> None:
        self.points: list[MetricPoint] = []
        self.unavailable = False

    def __call__(self, points: Sequence[MetricPoint]) -> None:
        if self.unavailable:
            raise ConnectionError("nobody home\nand a long story")
        self.points += points

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(p.step, p.value) for p in self.points if p.name == name]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def metrics(tmp_path: Path) -> MetricLog:
    return MetricLog(tmp_path / "metrics.jsonl")


def test_an_outage_is_one_line_in_the_log_and_its_end_another(
    metrics: MetricLog, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tried = threading.Semaphore(0)

    def job() -> None:
        try:
            metrics.deliver(store)
        finally:
            tried.release()

    store.unavailable = True
    uploader = BackgroundUploader([job], "http://store", "out", interval=0.001, max_interval=0.005)
    metrics.append(0, {"loss": 1.0})
    for _ in range(10):
        assert tried.acquire(timeout=5)
    assert uploader.is_unavailable
    store.unavailable = False
    while store.series("loss") != [(0, 1.0)]:
        assert tried.acquire(timeout=5)
    metrics.append(1, {"loss": 2.0})
    assert uploader.close(timeout=5)
    assert store.series("loss") == [(0, 1.0), (1, 2.0)]
    outage, end = (record.getMessage() for record in caplog.records)
    assert "http://store is unreachable (nobody home)" in outage
    assert "is reachable again" in end


def test_closing_does_not_wait_for_a_store_that_hangs(metrics: MetricLog) -> None:
    hang = threading.Event()
    uploader = BackgroundUploader([hang.wait], "store", "metrics.jsonl", interval=0.001)
    assert not uploader.close(timeout=0.05)
    hang.set()


def test_closing_gives_the_store_a_last_chance_even_in_a_long_pause(metrics: MetricLog, store: Store) -> None:
    metrics.append(0, {"loss": 1.0})
    uploader = BackgroundUploader([lambda: metrics.deliver(store)], "store", "metrics.jsonl", interval=3600)
    assert uploader.close(timeout=5)
    assert store.series("loss") == [(0, 1.0)]


class Shop:
    """A store for jobs; it refuses `broken` ones for good."""

    def __init__(self) -> None:
        self.unavailable = False
        self.taken: list[str] = []
        self.asked = 0
        self.known_unavailable = False
        self.retries = RetryQueue(
            "shop", lambda error: isinstance(error, ValueError), lambda: self.known_unavailable
        )

    def bring(self, what: str, broken: bool = False) -> str | None:
        def job() -> str:
            self.asked += 1
            if broken:
                raise ValueError("bad goods")
            if self.unavailable:
                raise ConnectionError("closed")
            self.taken.append(what)
            return what

        return self.retries.submit(what, job)


def test_failed_jobs_succeed_in_order_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    assert shop.bring("a") == "a"
    shop.unavailable = True
    assert shop.bring("b") is None
    assert shop.bring("c") is None
    assert shop.retries.pending == ["b", "c"]
    assert shop.asked == 2  # a store that has just failed is not asked again
    assert [record.getMessage() for record in caplog.records] == ["MLflow at shop: b not uploaded (closed)"]
    shop.unavailable = False
    assert shop.retries.flush()
    assert shop.taken == ["a", "b", "c"]


def test_a_store_that_stays_unavailable_is_asked_once_at_the_end() -> None:
    shop = Shop()
    shop.unavailable = True
    for what in "abc":
        shop.bring(what)
    asked = shop.asked
    assert not shop.retries.flush()
    assert shop.asked == asked + 1
    assert shop.retries.pending == ["a", "b", "c"]


def test_a_store_that_is_known_to_be_unavailable_is_not_asked() -> None:
    shop = Shop()
    shop.known_unavailable = True
    assert shop.bring("a") is None
    assert shop.asked == 0
    shop.known_unavailable = False
    assert shop.retries.flush()
    assert shop.taken == ["a"]


def test_a_refused_job_does_not_hold_up_the_others() -> None:
    shop = Shop()
    shop.bring("a", broken=True)
    assert shop.bring("b") == "b"
    assert not shop.retries.flush()
    assert shop.retries.pending == ["a"]
