"""The watchdog with a clock that the tests set."""

from __future__ import annotations

import pytest

from bim.orchestrator.training.watchdog import LOADER, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def look(watchdog: Watchdog, clock: Clock, seconds: float, step: int = 0, stage: int = 1) -> float | None:
    """Look at a stage once a second for so long; the last answer."""
    hung = watchdog.hung_for(step, stage)
    for _ in range(int(seconds)):
        clock.now += 1
        hung = watchdog.hung_for(step, stage)
        if hung is not None:
            return hung
    return hung


def test_half_an_hour_is_allowed_while_the_usual_time_is_unknown(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for _ in range(19):
        watchdog.record(1, 0.1)
    assert look(watchdog, clock, 1800) is None
    assert look(watchdog, clock, 1) == 1801


def test_ten_minutes_at_least_once_it_is_known(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for _ in range(20):
        watchdog.record(1, 0.1)
    assert watchdog.limit_s(1) == 600
    assert watchdog.limit_s(1, saves=True) == watchdog.limit_s(LOADER) == 1800
    assert look(watchdog, clock, 601) == 601


def test_twenty_times_the_median_of_the_last_hundred(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for _ in range(200):
        watchdog.record(1, 5.0)
    for _ in range(100):
        watchdog.record(1, 40.0)
    assert watchdog.usual_s(1) == 40
    assert watchdog.limit_s(1) == 800


def test_a_new_micro_batch_or_another_stage_begins_anew(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for _ in range(20):
        watchdog.record(1, 0.1)
        watchdog.record(2, 0.1)
    for step in range(5):
        assert look(watchdog, clock, 400, step, stage=1) is None
        assert look(watchdog, clock, 400, step, stage=2) is None


def test_the_time_in_which_the_process_was_stopped_does_not_count(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for _ in range(20):
        watchdog.record(1, 0.1)
    assert look(watchdog, clock, 500) is None
    clock.now += 86400  # Ctrl-Z, and SIGCONT on the next day
    assert watchdog.hung_for(0, 1) is None
    assert look(watchdog, clock, 99) is None
    assert look(watchdog, clock, 2) == 601


def test_after_a_reset_the_usual_time_is_unknown_again(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for _ in range(30):
        watchdog.record(1, 0.1)
    watchdog.reset()
    assert watchdog.limit_s(1) == 1800
    assert watchdog.usual_s(1) is None


def test_a_stage_that_is_three_times_slower_than_the_others_is_found(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    for step in range(20):
        assert watchdog.slow_stage(3) is None, step
        for stage, seconds in enumerate((0.1, 0.32, 0.1)):
            watchdog.record(stage, seconds)
    assert watchdog.slow_stage(3) == (1, pytest.approx(3.2))
    for _ in range(100):
        watchdog.record(1, 0.2)
    assert watchdog.slow_stage(3) is None
    assert watchdog.slow_stage(1) is None
