"""Signals and the processes that the driver starts. A leaf; `runs/signals.py` says what the driver does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
"""End a command in order."""

HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
"""What a command does not leave to the system."""


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Processes that this thread starts inside never see the signals of a command; SIGKILL ends them.

    A terminal that closes, a batch system and `timeout` signal every process of a job. The driver alone answers, and its
    last checkpoint needs the others. Meanwhile its own signals reach this process through its other threads.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """What a library installs inside for the signals of a command is replaced by what was there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # of a program that embeds Python
                signal.signal(number, handler)
