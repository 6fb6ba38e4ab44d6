"""The thread that sends: it never raises, and is waited for as long as the store takes something."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from bim.orchestrator.reporting.log import line_prefix
from bim.orchestrator.tracking.background_upload import BackgroundUploader


class Sender:
    """Fails while the store is down; counts its rounds."""

    def __init__(self) -> None:
        self.last_progress = 0.0
        self.is_down = False
        self.finals: list[bool] = []
        self.cancelled = threading.Event()
        self.rounds = threading.Semaphore(0)

    def send(self, final: bool = False) -> None:
        self.finals.append(final)
        try:
            if self.is_down:
                raise ConnectionError("connection refused\nand a long story")
        finally:
            self.rounds.release()

    def begin_end(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled.set()


def test_an_outage_is_one_line_in_the_log_and_its_end_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    sender = Sender()
    sender.is_down = True
    uploader = BackgroundUploader(sender, "http://store", "out", interval=0.001, max_interval=0.005)
    for _ in range(10):
        assert sender.rounds.acquire(timeout=5)
    assert uploader.is_unavailable
    sender.is_down = False
    while uploader.is_unavailable:
        assert sender.rounds.acquire(timeout=5)
    assert uploader.close(idle_timeout=5, timeout=5)
    outage, end = (record.getMessage() for record in caplog.records)
    assert "http://store does not take what the run records (connection refused); the run goes on" in outage
    assert "is reachable again" in end


def test_closing_does_not_wait_for_a_store_that_hangs() -> None:
    hang = threading.Event()

    class Hanging(Sender):
        def send(self, final: bool = False) -> None:
            hang.wait()

    sender = Hanging()
    uploader = BackgroundUploader(sender, "store", "out", interval=0.001)
    assert not uploader.close(idle_timeout=0.05, timeout=60)
    assert sender.cancelled.is_set()
    hang.set()


def test_closing_waits_as_long_as_a_slow_store_takes_something_and_no_longer_than_it_may() -> None:
    steps = 0

    class Slow(Sender):
        def send(self, final: bool = False) -> None:
            nonlocal steps
            for _ in range(8):
                time.sleep(0.02)
                self.last_progress = time.monotonic()
                steps += 1
                if self.cancelled.is_set():
                    return

    assert BackgroundUploader(Slow(), "store", "out", interval=3600).close(idle_timeout=5, timeout=60)
    assert steps == 8
    assert not BackgroundUploader(Slow(), "store", "out", interval=3600).close(idle_timeout=5, timeout=0.05)


def test_closing_gives_the_store_a_last_chance_even_in_a_long_pause() -> None:
    sender = Sender()
    uploader = BackgroundUploader(sender, "store", "out", interval=3600)
    assert uploader.close(idle_timeout=5, timeout=5)
    assert sender.finals == [True]


def test_the_lines_of_the_thread_are_those_of_the_backbone_that_started_it() -> None:
    prefixes: list[str] = []

    class Logging(Sender):
        def send(self, final: bool = False) -> None:
            from bim.orchestrator.reporting import log

            prefixes.append(log._prefix.get())

    with line_prefix("vit"):
        uploader = BackgroundUploader(Logging(), "store", "out", interval=3600)
    uploader.close(idle_timeout=5, timeout=5)
    assert prefixes == ["vit  "]
