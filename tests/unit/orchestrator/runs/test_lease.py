"""Who may write into an output directory; with a process table and a clock of the tests' own, nothing sleeps."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
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
    HEARTBEAT_S,
    LEASE,
    STALE_AFTER_S,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    System,
    acquire,
    holder,
    process_start,
    take,
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


def test_a_second_process_is_refused_and_told_who_the_first_one_is(tmp_path: Path) -> None:
    alpha = Machine()
    first = take(tmp_path, "run", alpha.process(11))
    with pytest.raises(LeaseHeldError, match=r"^process 11 on alpha \(since "):
        take(tmp_path, "run", alpha.process(12))
    assert alpha.clock == 0
    first.check()
    first.release()
    assert left_behind(tmp_path) == []
    second = take(tmp_path, "run", alpha.process(12))
    first.release()
    second.check()


def test_a_process_that_is_dead_on_this_machine_is_followed_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alpha = Machine()
    take(tmp_path, "run", alpha.process(11))
    del alpha.table[11]
    second = take(tmp_path, "run", alpha.process(12))
    assert second.previous is not None
    assert second.previous.pid == 11
    assert alpha.clock == 0
    assert "is taken over from process 11 on alpha" in caplog.text
    assert left_behind(tmp_path) == [LEASE]


def test_a_later_process_with_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    alpha = Machine()
    take(tmp_path, "run", alpha.process(11, start="100"))
    alpha.table[11] = "200"
    take(tmp_path, "run", alpha.process(12)).check()


@pytest.mark.parametrize(
    "elsewhere",
    [Machine("beta"), Machine("alpha", "boot-2")],
    ids=["another host", "a host of the same name"],
)
def test_a_process_of_another_machine_is_watched_by_the_clock_of_this_one(
    tmp_path: Path, elsewhere: Machine
) -> None:
    elsewhere.clock = 1e6  # no two machines' clocks agree
    take(tmp_path, "run", elsewhere.process(11))
    alpha = Machine()
    alpha.table[11] = "100"  # another process, which says nothing
    second = take(tmp_path, "run", alpha.process(12))
    assert alpha.clock == pytest.approx(STALE_AFTER_S, abs=1)
    assert second.previous is not None


def test_a_process_of_another_machine_that_beats_keeps_its_lease(tmp_path: Path) -> None:
    first = take(tmp_path, "run", Machine("beta").process(11))
    alpha = Machine()

    def beat() -> None:
        if alpha.clock % HEARTBEAT_S == 0:
            first.beat()

    alpha.other_processes = beat
    with pytest.raises(LeaseHeldError, match="process 11 on beta"):
        take(tmp_path, "run", alpha.process(12))
    assert alpha.clock <= 2 * HEARTBEAT_S


def test_a_process_that_stood_still_learns_that_it_was_taken_over(tmp_path: Path) -> None:
    first = take(tmp_path, "run", Machine("beta").process(11))
    second = take(tmp_path, "run", Machine().process(12))
    first.raise_if_lost()  # no file is read
    first.beat()
    for check in (first.raise_if_lost, first.check):
        with pytest.raises(LeaseLostError, match=r"taken over by process 12 on alpha"):
            check()
    first.release()
    second.check()


def test_a_heartbeat_goes_on_with_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(tmp_path, "run", Machine().process(11))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = (tmp_path / LEASE).stat().st_mtime_ns
    first.beat()
    assert (tmp_path / LEASE).stat().st_mtime_ns != before
    first.check()


def test_a_directory_that_is_gone_or_replaced_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL_S", 0.001)
    out = tmp_path / "out"
    out.mkdir()
    first = take(out, "run", Machine().process(11))
    out.rename(tmp_path / "elsewhere")
    with pytest.raises(LeaseLostError, match="out is gone; was it renamed, removed or unmounted"):
        first.check()
    assert not out.exists()

    out.mkdir()
    second = take(out, "run", Machine().process(11))
    out.rename(tmp_path / "elsewhere too")
    out.mkdir()
    with pytest.raises(LeaseLostError, match="was the output directory replaced or unmounted"):
        second.check()


GARBAGE = [
    b"",
    b"\x00\xff\xfe",
    b"{",
    b"[]",
    b"null",
    b'{"pid": 3}',
    b"[" * 100_000,
    b'{"pid": "11", "host": 3}',
]


@pytest.mark.parametrize("content", GARBAGE)
def test_a_lease_that_names_nobody_is_taken_over_when_nobody_writes_it(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / LEASE).write_bytes(content)
    assert holder(tmp_path, Machine().process(12)) is None
    alpha = Machine()
    take(tmp_path, "run", alpha.process(12)).check()
    assert alpha.clock == pytest.approx(STALE_AFTER_S, abs=1)


def test_what_is_not_a_file_in_its_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / LEASE).mkdir()
    with pytest.raises(OSError, match=r"[Ii]s a directory"):
        take(tmp_path, "run", Machine().process(12))
    (tmp_path / LEASE).rmdir()
    os.mkfifo(tmp_path / LEASE)
    with pytest.raises(OSError, match=r"lease\.json is not a file"):
        take(tmp_path, "run", Machine().process(12))


def test_the_holder_is_known_without_waiting(tmp_path: Path) -> None:
    alpha = Machine()
    asking = alpha.process(12)
    assert holder(tmp_path, asking) is None
    first = take(tmp_path, "run", alpha.process(11))
    assert holder(tmp_path, asking) == first.holder
    del alpha.table[11]
    assert holder(tmp_path, asking) is None
    beta = Machine("beta").process(12)
    assert holder(tmp_path, beta) == first.holder


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    first = take(tmp_path, "run", Machine().process(11))
    first.check()
    assert json.loads((tmp_path / LEASE).read_text())["pid"] == 11
    with pytest.raises(LeaseHeldError):
        take(tmp_path, "run", Machine().process(11))
    assert left_behind(tmp_path) == [LEASE]


# -- two processes at every pair of moments ---------------------------------------------------------------------------


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


# -- the real thing ---------------------------------------------------------------------------------------------------


def test_a_process_of_this_machine_holds_while_it_lives_and_no_longer(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from bim.orchestrator.runs.lease import System, take\n"
        "take(Path(sys.argv[1]), 'run', System()); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(LeaseHeldError, match=f"process {child.pid} on "), acquire(tmp_path, "run"):
            pass
        child.kill()
        child.wait()
    with acquire(tmp_path, "run") as lease:
        assert lease.previous is not None
        assert lease.previous.pid == child.pid
    assert left_behind(tmp_path) == []


def test_the_thread_of_a_lease_beats_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    with acquire(tmp_path, "run"):
        first = json.loads((tmp_path / LEASE).read_text())["heartbeat"]
        for _ in range(500):
            if json.loads((tmp_path / LEASE).read_text())["heartbeat"] > first:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("no heartbeat within five seconds")
    assert not any(
        thread.name == f"lease of {tmp_path}" for thread in threading.enumerate() if thread.is_alive()
    )


def test_a_zombie_does_not_run() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # a zombie: it has ended and was not waited for
    for _ in range(500):
        if process_start(child.pid) is None:
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("a zombie counts as running")
    child.wait()
    assert process_start(child.pid) is None


def test_a_link_that_leads_nowhere_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / LEASE).symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="a link that leads nowhere"), acquire(tmp_path, "run"):
        pass


def test_a_full_disk_leaves_no_empty_lease_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / LEASE, os.write

    def full(file: int, data: bytes) -> int:
        if path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    def refused(*names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"), acquire(tmp_path, "run"):
        pass
    assert not path.exists()
