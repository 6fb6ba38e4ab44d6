"""The lease of an output directory: a file by which one process at a time may write there.

The holder changes the file every `HEARTBEAT_S`. Another process on the same machine asks the process table whether the
holder lives; one on another machine watches the file by its own clock, so that no two clocks have to agree.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from bim.orchestrator.training.errors import TrainingError

LEASE = "lease.json"

HEARTBEAT_S = 10.0
"""Seconds between two changes of the file by its holder."""

STALE_AFTER_S = 60.0
"""Seconds without a change after which a holder on another machine counts as dead."""

POLL_INTERVAL_S = 1.0

LOOKS = 5
"""Looks at a lease that is missing or cannot be read, `POLL_INTERVAL_S` apart, before it counts as lost: another process
may be putting it back, or a file server restarts."""

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links answers."""

log = logging.getLogger(__name__)


class LeaseHeldError(RuntimeError):
    """Another process holds the lease, or what lies in its place cannot be read; the message says which."""


class LeaseLostError(TrainingError):
    """The holder may no longer write: the output directory is gone, or another process took the lease over."""


class System:
    """What a lease asks of the machine on which this process runs."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.machine = _machine_id()
        self.pid = os.getpid()

    def process_start(self, pid: int) -> str | None:
        """When a process started, in units of the system; None if it does not run."""
        return process_start(pid)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease, as the file describes it.

    Args:
        run_id: of the run in the output directory.
        host: name of its machine.
        machine: the machine since it was booted, and the process namespace; process ids are comparable where it is equal.
        process_start: tells the process from a later one with the same pid.
        since: local date and time of the acquisition.
        token: random, of this acquisition.
    """

    run_id: str
    host: str
    machine: str
    pid: int
    process_start: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


class Lease:
    """A lease that this process holds. Made by `acquire`; `check` may be called from any thread.

    Attributes:
        holder: this process.
        previous: the dead process from which the lease was taken over.
    """

    def __init__(self, path: Path, holder: Holder, file: int, previous: Holder | None) -> None:
        self.path, self.holder, self.previous = path, holder, previous
        self._file = file
        self._file_lock = threading.Lock()
        self._beats = 0
        self._lost: str | None = None
        self._released = threading.Event()

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError if a heartbeat found that the lease is lost. Touches no file."""
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def check(self) -> None:
        """Look whether the lease is still that of this process.

        Raises:
            LeaseLostError: the output directory is gone, or another process took the lease over.
        """
        if self._lost is None:
            self._lost = self._loss()
        self.raise_if_lost()

    def beat(self) -> None:
        """Change the file, so that others see that this process lives. Never raises."""
        with self._file_lock:
            if self._released.is_set():
                return
            self._beats += 1
            # The open file is that of this process, wherever a later holder may have moved it.
            with contextlib.suppress(OSError):  # a full disk, for one
                os.pwrite(self._file, _content(self.holder, self._beats), 0)
            with contextlib.suppress(OSError):
                os.utime(self._file)
                os.fsync(self._file)
        with contextlib.suppress(LeaseLostError):
            self.check()

    def keep_alive(self) -> None:
        """Beat until the release; runs in a thread of its own."""
        while not self._released.wait(HEARTBEAT_S):
            self.beat()

    def release(self) -> None:
        """Remove the file, if it is still that of this process. A second call does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        with contextlib.suppress(OSError):
            sighting = _look(self.path)
            if sighting is not None and _token(sighting) == self.holder.token:
                self.path.unlink()
        # A heartbeat that hangs in a file system which is away keeps its file open.
        if self._file_lock.acquire(timeout=POLL_INTERVAL_S):
            os.close(self._file)
            self._file_lock.release()

    def _loss(self) -> str | None:
        out, cause = self.path.parent, ""
        for attempt in range(LOOKS):
            if attempt and self._released.wait(POLL_INTERVAL_S):
                return None
            try:
                sighting = _look(self.path)
            except OSError as error:
                cause = f"the output directory {out} cannot be read any more ({error.strerror or error})"
                continue
            if sighting is None and not out.is_dir():
                return f"the output directory {out} is gone; was it renamed, removed or unmounted?"
            cause = (
                f"{self.path} is gone: was the output directory replaced or unmounted, or the file removed?"
            )
            if sighting is not None and _token(sighting) == self.holder.token:
                return None
            if sighting is not None:
                return f"the output directory {out} was taken over by {_parse(sighting) or 'another process'}"
        return cause


@contextmanager
def acquire(out: Path, run_id: str, system: System | None = None) -> Iterator[Lease]:
    """Hold the lease of an existing directory; it is released at the end of the context.

    Waits up to `STALE_AFTER_S` where a process on another machine may hold it; one that is dead is taken over, and logged.

    Raises:
        LeaseHeldError: another process holds it.
        OSError: the directory is gone, or cannot be written to.
    """
    lease = take(out, run_id, system or System())
    thread = threading.Thread(target=lease.keep_alive, name=f"lease of {out}", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.release()
        thread.join(timeout=POLL_INTERVAL_S)


def holder(out: Path, system: System | None = None) -> Holder | None:
    """The process that holds the lease of a directory, without waiting.

    None: no process, or one of this machine that is dead. A process on another machine is returned, dead or not.

    Raises:
        OSError: the lease cannot be read.
    """
    sighting = _look(out / LEASE)
    process = None if sighting is None else _parse(sighting)
    return None if process is None or _is_alive(process, system or System()) is False else process


def take(out: Path, run_id: str, system: System) -> Lease:
    """Acquire without the thread that beats; see `acquire`."""
    path = out / LEASE
    me = Holder(
        run_id=run_id,
        host=system.host,
        machine=system.machine,
        pid=system.pid,
        process_start=system.process_start(system.pid) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=secrets.token_hex(8),
    )
    previous: Holder | None = None
    watched: tuple[_Sighting, float] | None = None
    while True:
        file = _create(path, _content(me, 0), me.token)
        if file is not None:
            return Lease(path, me, file, previous)
        sighting = _look(path)
        if sighting is None:
            if path.is_symlink():
                raise OSError(errno.ENOENT, "it is a link that leads nowhere", str(path))
            continue
        other, now = _parse(sighting), system.monotonic()
        alive = None if other is None else _is_alive(other, system)
        if watched is not None and watched[0] != sighting:
            alive = True  # it, or one that took it over, beats
        if alive:
            raise LeaseHeldError(f"{other or f'a process that writes {path}'}")
        if watched is None:
            watched = (sighting, now)
            if alive is None:
                log.info(
                    "waiting up to %.0f s: %s may be in use by %s",
                    STALE_AFTER_S,
                    out,
                    other or "another process",
                )
        if alive is False or now - watched[1] >= STALE_AFTER_S:
            if _remove_stale(path, sighting, me.token):
                previous, watched = other, None
                log.warning("%s is taken over from %s, which has ended", out, other or "an unknown process")
        else:
            system.sleep(POLL_INTERVAL_S)


def process_start(pid: int) -> str | None:
    """When a process started, in units of the system; None if it does not run or is a zombie."""
    try:
        # After the name in parentheses: the state, and as the 20th field the start in clock ticks since the boot.
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (OSError, ValueError, IndexError):
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class _Sighting:
    """The lease file at one moment. Equal sightings: it was not changed in between."""

    content: bytes
    inode: int
    mtime_ns: int


def _look(path: Path) -> _Sighting | None:
    """The file as it is; None if it is missing. Raises OSError, also for what is not a file."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} is not a file")
            return _Sighting(file.read(1 << 16), status.st_ino, status.st_mtime_ns)
    except FileNotFoundError:
        return None


def _create(path: Path, content: bytes, token: str) -> int | None:
    """Make the file with its whole content. Returns it, open for writing; None if there is one already."""
    temporary = path.with_name(f".{LEASE}.{token}.tmp")
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, content)
        os.fsync(file)
        os.link(temporary, path)
    except FileExistsError:
        os.close(file)
        return None
    except OSError as error:
        os.close(file)
        if error.errno not in NO_HARD_LINKS:
            raise
        return _create_exclusively(path, content)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return file


def _create_exclusively(path: Path, content: bytes) -> int | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    try:
        os.write(file, content)
        os.fsync(file)
    except OSError:  # an empty lease would be waited for
        os.close(file)
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return file


def _remove_stale(path: Path, sighting: _Sighting, token: str) -> bool:
    """Remove the lease of a dead process. False if another process was quicker, whose lease then stays."""
    aside = path.with_name(f".{LEASE}.{token}.stale.tmp")
    try:
        if _look(path) != sighting:
            return False
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    try:
        moved = _look(aside)
        if moved == sighting:
            return True
        with contextlib.suppress(FileExistsError):  # a third process has it now; the second one will notice
            os.link(aside, path)
        return False
    finally:
        aside.unlink(missing_ok=True)


def _is_alive(process: Holder, system: System) -> bool | None:
    """Whether a holder runs; None if it is on another machine, where this process cannot look."""
    if not system.machine or (process.host, process.machine) != (system.host, system.machine):
        return None
    start = system.process_start(process.pid)
    return start is not None and start == process.process_start


def _content(process: Holder, beats: int) -> bytes:
    """The file; all heartbeats of a holder have the same length, so that one is overwritten by the next in place."""
    return json.dumps({**asdict(process), "heartbeat": f"{beats:010d}"}, indent=1).encode() + b"\n"


def _parse(sighting: _Sighting) -> Holder | None:
    """The holder that a file names; None if it names none."""
    try:
        record = json.loads(sighting.content)
        values = {field.name: record[field.name] for field in fields(Holder)}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_complete = all(type(value) is (int if name == "pid" else str) for name, value in values.items())
    return Holder(**values) if is_complete and 0 < values["pid"] < 1 << 31 else None


def _token(sighting: _Sighting) -> str | None:
    process = _parse(sighting)
    return None if process is None else process.token


def _machine_id() -> str:
    """The boot of this machine and the process namespace, in which a process id means one process; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        pass
    try:
        return f"booted {psutil.boot_time():.0f}"
    except (psutil.Error, OSError):
        return ""
