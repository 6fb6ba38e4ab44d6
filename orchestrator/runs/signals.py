"""What signals mean to a command, in every phase.

| signal | what happens | exit status |
|---|---|---|
| INT, TERM, HUP, QUIT | stop, with a checkpoint if one is committed in time; a second one stops at once | 128 + n |
| USR1 | a training saves a checkpoint and goes on | |
| USR2 | as TERM, but the checkpoint is waited for: another process is to resume the run | 75 |

While a training can save, a signal is a request that the loop obeys (`stop_on_signals`); in every other phase it raises
KeyboardInterrupt where the main thread is. `command_signals` surrounds a whole command and bounds its end in time, also
where the main thread is inside a library that does not return.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from bim.orchestrator.signal_masks import HANDLED_SIGNALS, STOP_SIGNALS
from bim.orchestrator.training.callbacks import SAVE_TIMEOUT_S, StopRequest

CLOSE_TIMEOUT_S = 15.0
"""How long after the checkpoint files, actors and MLflow may take to be closed."""

SECOND_SIGNAL_TIMEOUT_S = 1.8
"""The same after a second signal; with the forced exit it is less than 3 seconds."""

FORCED_EXIT_S = 0.6
"""How long the callbacks of a forced exit may take."""

RESUME_ME = 75
"""Exit status after SIGUSR2: EX_TEMPFAIL, which job schedulers take as a request to run the job again."""

SAVING = "saving a checkpoint after the step under way; the training goes on"

SHOW_CURSOR = "\x1b[?25h"

log = logging.getLogger(__name__)

_forced_exit_callbacks: list[Callable[[], object]] = []


def exit_status(signal_name: str) -> int:
    """The exit status of a command that the signal of this name ended."""
    number = signal.Signals[signal_name]
    return RESUME_ME if number == signal.SIGUSR2 else 128 + number


def leave(status: int) -> NoReturn:
    """End this process with a command's exit status; after a signal without the interpreter's own end.

    That end frees every module and object, for seconds on a busy machine; by then all files and connections are closed.
    """
    if status == RESUME_ME or status > 128:
        _exit(status)
    sys.exit(status)


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)


@contextmanager
def stop_on_signals(
    stop: StopRequest, meanwhile: str = "", interrupts_idle: bool = False, on_save: str = SAVING
) -> Iterator[None]:
    """Inside, the first signal sets `stop.reason` to its name; a second one, or the time limit, raises KeyboardInterrupt.

    Args:
        meanwhile: what is still done after the first signal, for the user; by default the checkpoint.
        on_save: what SIGUSR1 does, for the user.
        interrupts_idle: raise at the first signal too unless `stop.can_save`: the main thread itself trains.

    Outside the main thread nothing is changed: Python delivers signals to the main thread alone.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            stop.saves_requested += 1
            log.info("%s: %s", name, on_save)
            return
        if stop.reason is not None:
            raise KeyboardInterrupt
        stop.reason = name
        if interrupts_idle and not stop.can_save:
            log.info("%s: stopping; there is nothing new to save", name)
            raise KeyboardInterrupt
        waits = number == signal.SIGUSR2
        limit = "" if waits else f" (at most {SAVE_TIMEOUT_S:.0f} s)"
        log.info("%s: %s%s; once more stops at once", name, meanwhile or "saving a checkpoint", limit)
        if not waits:
            signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, SAVE_TIMEOUT_S)

    with _handled_by(handle):
        alarm = signal.getsignal(signal.SIGALRM)
        try:
            yield
        finally:
            if _in_main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, alarm)


@contextmanager
def interrupted_by_signals(stop: StopRequest) -> Iterator[None]:
    """Inside, a signal sets `stop.reason` to its name and raises KeyboardInterrupt; SIGUSR1 only logs a line."""

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            log.info("%s: no training is in progress, so there is nothing new to save", name)
            return
        if stop.reason is None:
            stop.reason = name
            log.info("%s: stopping", name)
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextmanager
def command_signals(stop: StopRequest) -> Iterator[None]:
    """Around a whole command: `interrupted_by_signals`, and a forced exit if it does not end in time after a signal.

    The forced exit calls the callbacks of `at_forced_exit`, kills the child processes of this one and leaves with the status
    of the first signal.
    """
    if not _in_main_thread():
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reading, stop), name="signals", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        with interrupted_by_signals(stop):
            yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()  # ends the thread
        watcher.join()
        reading.close()


@contextmanager
def at_forced_exit(callback: Callable[[], object]) -> Iterator[None]:
    """Inside, a forced exit calls `callback`, in a thread of its own that gets `FORCED_EXIT_S`."""
    _forced_exit_callbacks.append(callback)
    try:
        yield
    finally:
        _forced_exit_callbacks.remove(callback)


def _interrupt(number: int, frame: FrameType | None) -> None:
    log.info("no orderly end within %.0f s; stopping at once", SAVE_TIMEOUT_S)
    raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if not _in_main_thread():
        yield
        return
    # `nohup` ignores SIGHUP, and a shell SIGINT and SIGQUIT of what it runs in the background; that stays. So does a
    # handler of a program that embeds Python (None), which could not be put back.
    heard = [n for n in HANDLED_SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(received: socket.socket, stop: StopRequest) -> None:
    """Read the numbers of the signals of this process, as soon as they arrive, and force the exit when the time is over."""
    first: int | None = None
    deadline: float | None = None
    while True:
        received.settimeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            numbers = received.recv(64)
        except TimeoutError:
            assert first is not None
            _force_exit(signal.Signals(first).name)
            return
        if not numbers:
            return
        for number in numbers:
            if number not in STOP_SIGNALS:
                continue
            if first is None:
                first = number
                if number != signal.SIGUSR2:  # its checkpoint is waited for
                    deadline = time.monotonic() + SAVE_TIMEOUT_S + CLOSE_TIMEOUT_S
            else:
                second = time.monotonic() + SECOND_SIGNAL_TIMEOUT_S
                deadline = second if deadline is None else min(deadline, second)


def _force_exit(signal_name: str) -> None:
    with suppress(Exception):
        log.info("stopped by %s without waiting for what was open", signal_name)
    _kill_children()  # before the callbacks: nothing writes any more
    threads = [
        threading.Thread(target=_quietly, args=(callback,), daemon=True)
        for callback in _forced_exit_callbacks
    ]
    end = time.monotonic() + FORCED_EXIT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    with suppress(Exception):
        if sys.stdout.isatty():
            sys.stdout.write(SHOW_CURSOR)  # a live display hides it
    _exit(exit_status(signal_name))


def _quietly(callback: Callable[[], object]) -> None:
    with suppress(BaseException):
        callback()


def _kill_children() -> None:
    """Kill every process below this one: Ray's daemons and its workers, and those that load data."""
    import psutil

    with suppress(psutil.Error):
        children = psutil.Process().children(recursive=True)
        for child in children:
            with suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=0.2)
