"""Whole images decoded by worker processes are those that one process decodes, whatever happens to the workers."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch import Tensor

from bim.orchestrator.data import whole_images
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.whole_images import DECIDED_EVERY
from tests.unit.orchestrator.data.slow_source import SlowSource

Make = Callable[..., Path]
INDICES = np.arange(0, 300, 2)


@pytest.fixture
def workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started at the first estimate."""
    monkeypatch.setattr(whole_images, "WORKERS_FROM_S", 0.0)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() == before


def children() -> list[int]:
    return sorted(process.pid for process in psutil.Process().children())


class Counting(DigitsSource):
    """The digits; counts what this process reads."""

    loads = 0

    def load(self, index: int) -> Tensor:
        Counting.loads += 1
        return super().load(index)


def batches(source: Source, workers: int, **options: Any) -> list[tuple[list[int], np.ndarray]]:
    with closing(eval_images(source, INDICES, (8, 8), 40, workers=workers, **options)) as images:
        return [(numbers.tolist(), pixels) for numbers, pixels in images]


def same(ours: list[tuple[list[int], np.ndarray]], theirs: list[tuple[list[int], np.ndarray]]) -> bool:
    return [n for n, _ in ours] == [n for n, _ in theirs] and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )


@pytest.mark.usefixtures("workers_at_once")
def test_workers_give_the_same_batches_and_name_the_same_bad_images(image_folder: Make) -> None:
    names = [f"{number:03d}.png" for number in range(120)]
    source = FolderSource(image_folder(*names, damaged=("003.png", "040.png", "041.png", "119.png")))

    def read(workers: int) -> tuple[list[tuple[list[int], np.ndarray]], dict[str, str]]:
        bad = BadImages()
        with closing(eval_images(source, np.arange(120), (8, 8), 40, bad, workers)) as images:
            return [(numbers.tolist(), pixels) for numbers, pixels in images], bad.reasons

    (ours, our_bad), (theirs, their_bad) = read(2), read(0)
    assert same(ours, theirs)
    assert [len(numbers) for numbers, _ in ours] == [40, 40, 36]
    assert our_bad == their_bad
    assert len(our_bad) == 4
    with pytest.raises(TooManyCorruptImagesError, match="3 of 120 images could not be read"):
        list(eval_images(source, np.arange(120), (8, 8), 40, BadImages(0.01), 1))


def test_workers_start_once_the_images_that_are_left_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=1.0)  # a second passes between two looks
    monkeypatch.setattr(Counting, "loads", 0)
    monkeypatch.setattr(whole_images.time, "perf_counter", lambda: float(next(clock)))
    expected = batches(DigitsSource(), 0)
    assert same(batches(Counting(), 1), expected)
    assert Counting.loads == DECIDED_EVERY
    monkeypatch.setattr(whole_images, "WORKERS_FROM_S", float(len(INDICES)))
    assert same(batches(Counting(), 1), expected)
    assert Counting.loads == DECIDED_EVERY + len(INDICES)


def test_few_or_quick_images_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(whole_images, "Prefetcher", refuse)
    assert len(batches(DigitsSource(), 2)) == 4


@pytest.mark.usefixtures("workers_at_once")
def test_a_consumer_that_fails_ends_the_workers() -> None:
    def fail() -> None:
        with closing(eval_images(DigitsSource(), INDICES, (8, 8), 40, workers=1)) as images:
            for _ in images:
                assert psutil.Process().children()
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.usefixtures("workers_at_once")
def test_a_stop_is_looked_for_while_a_worker_is_waited_for() -> None:
    looks = [0]

    def check() -> None:
        looks[0] += 1
        if looks[0] > DECIDED_EVERY + 5:
            raise InterruptedError

    start = time.monotonic()
    with pytest.raises(InterruptedError):
        list(eval_images(SlowSource(60.0), INDICES, (8, 8), 40, workers=1, check=check))
    assert time.monotonic() - start < 10
    assert looks == [DECIDED_EVERY + 6]


@pytest.mark.usefixtures("workers_at_once")
def test_images_of_a_killed_worker_are_decoded_in_this_process(caplog: pytest.LogCaptureFixture) -> None:
    indices, read = np.arange(1000), []
    with closing(eval_images(DigitsSource(), indices, (8, 8), 40, workers=1)) as images:
        for numbers, pixels in images:
            read.append((numbers.tolist(), pixels))
            if len(read) == 1:
                psutil.Process().children()[-1].kill()
    expected = eval_images(DigitsSource(), indices, (8, 8), 40)
    assert same(read, [(numbers.tolist(), pixels) for numbers, pixels in expected])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "was killed by SIGKILL" in caplog.text
    assert "the other images are decoded in this process" in caplog.text


@pytest.mark.usefixtures("workers_at_once")
def test_where_no_process_can_be_started_this_one_decodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(whole_images, "Prefetcher", refuse)
    assert same(batches(DigitsSource(), 2), batches(DigitsSource(), 0))
    assert "Resource temporarily unavailable" in caplog.text
