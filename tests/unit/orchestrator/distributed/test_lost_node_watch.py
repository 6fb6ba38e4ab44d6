"""A node that is lost while a task is waited for is told at once, and waited for a limited time."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from bim.orchestrator.distributed import placement_group as module
from bim.orchestrator.distributed.placement import PlacementError
from bim.orchestrator.distributed.placement_group import LostNodeWatch, PlacementGroup

GROUP = cast(PlacementGroup, object())


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def states(monkeypatch: pytest.MonkeyPatch, *values: bool) -> list[bool]:
    left = list(values)
    monkeypatch.setattr(module, "has_lost_bundles", lambda group: left.pop(0))
    return left


def test_a_node_that_comes_back_in_time_costs_a_line(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    states(monkeypatch, False, True, True, False, True)
    watch = LostNodeWatch(GROUP, 10.0, "measuring")
    with caplog.at_level(logging.INFO, "bim"):
        for _ in range(5):
            watch.check()
            clock.now += 5
    line = "a node of the run is lost while measuring; waiting up to 10 s for another"
    assert caplog.messages == [line, line]


def test_it_is_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    states(monkeypatch, *[True] * 4)
    watch = LostNodeWatch(GROUP, 10.0, "measuring")
    for _ in range(3):
        watch.check()
        clock.now += 5
    with pytest.raises(
        PlacementError, match=r"lost while measuring, .* within 10 s; raise placement\.wait_s"
    ):
        watch.check()


def test_without_time_to_wait_it_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    states(monkeypatch, True)
    with pytest.raises(PlacementError, match=r"^a node of the run is lost while scoring$"):
        LostNodeWatch(GROUP, 0.0, "scoring").check()
    assert caplog.messages == []


def test_ray_is_asked_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    left: Any = states(monkeypatch, *[False] * 9)
    watch = LostNodeWatch(GROUP, 10.0, "measuring")
    for _ in range(10):
        watch.check()
        clock.now += 0.25
    assert len(left) == 6
