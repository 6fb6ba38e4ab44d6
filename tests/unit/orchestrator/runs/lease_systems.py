"""Machines with a process table and a clock of their own, for tests of leases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bim.orchestrator.runs.lease import (
    System,
)


class Machine:
    """A process table and a clock; `other_processes` runs while a process sleeps."""

    def __init__(self, host: str = "alpha", machine: str = "boot-1") -> None:
        self.host, self.machine = host, machine
        self.table: dict[int, str] = {}
        self.clock = 0.0
        self.other_processes: Callable[[], None] = lambda: None

    def process(self, pid: int, start: str = "100") -> FakeSystem:
        self.table[pid] = start
        return FakeSystem(self, pid)


class FakeSystem(System):
    def __init__(self, machine: Machine, pid: int) -> None:
        self._machine = machine
        self.host, self.machine, self.pid = machine.host, machine.machine, pid

    def process_start(self, pid: int) -> str | None:
        return self._machine.table.get(pid)

    def monotonic(self) -> float:
        return self._machine.clock

    def sleep(self, seconds: float) -> None:
        self._machine.clock += seconds
        self._machine.other_processes()


def left_behind(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())
