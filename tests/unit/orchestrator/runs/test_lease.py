"""Who may write into an output directory; with a process table and a clock of the tests' own, nothing sleeps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.runs import lease as module
from bim.orchestrator.runs.lease import (
    HEARTBEAT_S,
    LEASE,
    STALE_AFTER_S,
    LeaseHeldError,
    LeaseLostError,
    acquire,
    holder,
    process_start,
    take,
)
from tests.unit.orchestrator.runs.lease_systems import Machine, left_behind


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
