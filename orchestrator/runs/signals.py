"""What Ctrl-C and SIGTERM mean: while training a request to stop with a checkpoint, elsewhere an orderly end at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bim.orchestrator.training.callbacks import StopRequest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


@contextmanager
def stop_on_signals(
    stop: StopRequest, meanwhile: str = "finishing the steps under way, then saving"
) -> Iterator[None]:
    """Inside, the first signal sets `stop.reason` to its name; a second one raises KeyboardInterrupt.

    Args:
        meanwhile: what is still done after the first signal, for the user.

    Outside the main thread nothing is changed: Python delivers signals to the main thread alone.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.reason is not None:
            raise KeyboardInterrupt
        stop.reason = signal.Signals(number).name
        log.info("%s: %s; once more stops at once", stop.reason, meanwhile)

    with _handled_by(handle):
        yield


@contextmanager
def interrupted_by_signals(stop: StopRequest) -> Iterator[None]:
    """Inside, a signal sets `stop.reason` to its name and raises KeyboardInterrupt.

    Entered after Ray is connected, which installs handlers of its own.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        stop.reason = signal.Signals(number).name
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
