"""Delivery to a store that may be slow, away, or back."""

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
    """Takes points, unless it is away."""

    def __init__(self) -> None:
        self.points: list[MetricPoint] = []
        self.away = False

    def __call__(self, points: Sequence[MetricPoint]) -> None:
        if self.away:
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


def test_the_courier_says_once_that_the_store_is_away_and_once_that_it_is_back(
    metrics: MetricLog, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tried = threading.Semaphore(0)

    def job() -> None:
        try:
            metrics.deliver(store)
        finally:
            tried.release()

    store.away = True
    courier = BackgroundUploader([job], "http://store", "metrics.jsonl", interval=0.001, patience=0.005)
    metrics.append(0, {"loss": 1.0})
    for _ in range(10):
        assert tried.acquire(timeout=5)
    assert courier.down
    store.away = False
    while store.series("loss") != [(0, 1.0)]:
        assert tried.acquire(timeout=5)
    metrics.append(1, {"loss": 2.0})
    assert courier.close(timeout=5)
    assert store.series("loss") == [(0, 1.0), (1, 2.0)]
    away, back = (record.getMessage() for record in caplog.records)
    assert "http://store does not take metrics (nobody home)" in away
    assert "is back" in back


def test_closing_does_not_wait_for_a_store_that_hangs(metrics: MetricLog) -> None:
    hang = threading.Event()
    courier = BackgroundUploader([hang.wait], "store", "metrics.jsonl", interval=0.001)
    assert not courier.close(timeout=0.05)
    hang.set()


def test_closing_gives_the_store_a_last_chance_even_in_a_long_pause(metrics: MetricLog, store: Store) -> None:
    metrics.append(0, {"loss": 1.0})
    courier = BackgroundUploader([lambda: metrics.deliver(store)], "store", "metrics.jsonl", interval=3600)
    assert courier.close(timeout=5)
    assert store.series("loss") == [(0, 1.0)]


class Shop:
    """A store for jobs; `broken` are refused for their own sake."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[str] = []
        self.asked = 0
        self.known_away = False
        self.debts = RetryQueue("shop", lambda error: isinstance(error, ValueError), lambda: self.known_away)

    def bring(self, what: str, broken: bool = False) -> str | None:
        def job() -> str:
            self.asked += 1
            if broken:
                raise ValueError("bad goods")
            if self.away:
                raise ConnectionError("closed")
            self.taken.append(what)
            return what

        return self.debts.do(what, job)


def test_what_was_not_taken_is_taken_in_order_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    assert shop.bring("a") == "a"
    shop.away = True
    assert shop.bring("b") is None
    assert shop.bring("c") is None
    assert shop.debts.open == ["b", "c"]
    assert shop.asked == 2  # a store that has just failed is not asked again
    assert [record.getMessage() for record in caplog.records] == ["MLflow at shop did not take b (closed)"]
    shop.away = False
    assert shop.debts.settle()
    assert shop.taken == ["a", "b", "c"]


def test_a_store_that_stays_away_is_asked_once_at_the_end() -> None:
    shop = Shop()
    shop.away = True
    for what in "abc":
        shop.bring(what)
    asked = shop.asked
    assert not shop.debts.settle()
    assert shop.asked == asked + 1
    assert shop.debts.open == ["a", "b", "c"]


def test_a_store_that_is_known_to_be_away_is_not_asked() -> None:
    shop = Shop()
    shop.known_away = True
    assert shop.bring("a") is None
    assert shop.asked == 0
    shop.known_away = False
    assert shop.debts.settle()
    assert shop.taken == ["a"]


def test_a_job_refused_for_its_own_sake_does_not_hold_up_the_others() -> None:
    shop = Shop()
    shop.bring("a", broken=True)
    assert shop.bring("b") == "b"
    assert not shop.debts.settle()
    assert shop.debts.open == ["a"]
