"""Processes that want the same output directory at once: at any order of their file operations, one holds it."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.orchestrator.runs import lease as module
from bim.orchestrator.runs.lease import (
    LEASE,
    STALE_AFTER_S,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    take,
)
from tests.unit.orchestrator.runs.lease_systems import FakeSystem, Machine, left_behind


class TurnTaking:
    """Lets threads run their file operations one at a time, in the order of a schedule of thread numbers."""

    def __init__(self, schedule: list[int], num_threads: int) -> None:
        self._schedule = iter(schedule)
        self._running = set(range(num_threads))
        self._condition = threading.Condition()
        self._local = threading.local()
        self._turn = 0
        self._pass_on()

    def enter(self, number: int) -> None:
        self._local.number = number

    def leave(self) -> None:
        with self._condition:
            self._running.discard(self._local.number)
            self._pass_on()

    def gated(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number = getattr(self._local, "number", None)
            if number is None:
                return operation(*arguments, **options)
            with self._condition:
                assert self._condition.wait_for(lambda: self._turn == number, timeout=10)
                try:
                    return operation(*arguments, **options)
                finally:
                    self._pass_on()

        return call

    def _pass_on(self) -> None:
        with self._condition:
            turn = next(self._schedule, min(self._running, default=0))
            self._turn = turn if turn in self._running else min(self._running, default=0)
            self._condition.notify_all()


@contextmanager
def file_operations(gate: TurnTaking) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "link", "rename", "unlink"):
            patch.setattr(os, name, gate.gated(getattr(os, name)))
        yield


def race(out: Path, schedule: list[int], systems: list[FakeSystem]) -> list[Lease]:
    """The leases that processes get which try at the same time."""
    gate, leases = TurnTaking(schedule, len(systems)), list[Lease]()

    def attempt(number: int) -> None:
        gate.enter(number)
        try:
            leases.append(take(out, "run", systems[number]))
        except LeaseHeldError:
            pass
        finally:
            gate.leave()

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(len(systems))]
    with file_operations(gate):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    return leases


def valid(leases: list[Lease]) -> list[Lease]:
    checked = []
    for lease in leases:
        try:
            lease.check()
        except LeaseLostError:
            continue
        checked.append(lease)
    return checked


@pytest.mark.parametrize(
    "schedule", list(itertools.product((0, 1), repeat=6)), ids=lambda s: "".join(map(str, s))
)
def test_of_two_that_start_together_exactly_one_holds(tmp_path: Path, schedule: tuple[int, ...]) -> None:
    alpha = Machine()
    leases = race(tmp_path, list(schedule), [alpha.process(11), alpha.process(12)])
    assert len(valid(leases)) == len(leases) == 1
    assert left_behind(tmp_path) == [LEASE]


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.lists(st.integers(0, 2), max_size=40),
    count=st.integers(2, 3),
    machines=st.lists(st.sampled_from(["alpha", "beta"]), min_size=3, max_size=3),
    dead=st.sampled_from(["alpha", "beta", "nobody", "unreadable"]),
)
def test_never_do_two_hold_a_lease_whoever_takes_over_from_a_dead_process(
    schedule: list[int], count: int, machines: list[str], dead: str
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POLL_INTERVAL_S", STALE_AFTER_S / 2)
        out = Path(folder)
        hosts = {name: Machine(name) for name in ("alpha", "beta")}
        if dead in hosts:
            take(out, "run", hosts[dead].process(10))
            del hosts[dead].table[10]
        elif dead == "unreadable":
            (out / LEASE).write_bytes(b"torn")
        systems = [hosts[machines[number]].process(11 + number) for number in range(count)]
        leases = race(out, schedule, systems)
        assert len(valid(leases)) <= 1
        if count == 2:
            assert len(valid(leases)) == 1
        assert [name for name in left_behind(out) if name != LEASE] == []
