"""What Ctrl-C and SIGTERM mean: while training a request to stop with a checkpoint, elsewhere an orderly end at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bim.orchestrator.training.callbacks import StopRequest

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; whatever was opened is closed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals(
    stop: StopRequest,
    say: Callable[[str], None],
    meanwhile: str = "finishing the steps under way, then saving",
) -> Iterator[None]:
    """Inside, the first signal sets `stop.reason` to its name; a second one raises Interrupted.

    meanwhile: what is still done after the first, as told to the reader.

    Outside the main thread (a search trial) signals are not ours, and nothing is changed.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.reason is not None:
            raise Interrupted(number)
        stop.reason = signal.Signals(number).name
        say(f"{stop.reason}: {meanwhile}; once more stops at once")

    with _handled_by(handle):
        yield


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Inside, a signal raises Interrupted. Entered after Ray is connected, which puts handlers of its own in place."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled_by(handle):
        yield


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
