"""Ctrl-C and SIGTERM as a request to stop with a checkpoint, instead of an exception in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orchestrator.pretrain import StopRequest

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals(stop: StopRequest, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first signal sets `stop.reason` to its name; a second one interrupts at once (KeyboardInterrupt).

    Outside the main thread (a search trial) signals are not ours, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.reason is not None:
            raise KeyboardInterrupt
        stop.reason = signal.Signals(number).name
        say(f"{stop.reason}: finishing the steps under way, then saving; once more stops at once")

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
