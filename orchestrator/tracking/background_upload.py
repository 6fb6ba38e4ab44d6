"""A thread that sends what a run records to a store that may be slow or unavailable.

Nothing here raises, or makes the training wait, because of the store.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from typing import Protocol

from bim.orchestrator.tracking.store import summarize_error

log = logging.getLogger(__name__)


class Sender(Protocol):
    """What the thread runs; `bim.orchestrator.tracking.delivery.Delivery` is one."""

    last_progress: float

    def send(self, final: bool = False) -> None: ...

    def begin_end(self) -> None: ...

    def cancel(self) -> None: ...


class BackgroundUploader:
    """A thread that sends every `interval` seconds, and a last time when it is closed.

    While that fails it waits longer, up to `max_interval` seconds. The first failure is one line in the log, the
    recovery another; nothing is ever raised.

    Args:
        store, folder: address of the store and where its files are kept meanwhile, for messages.
    """

    def __init__(
        self, sender: Sender, store: str, folder: str, interval: float = 2.0, max_interval: float = 60.0
    ) -> None:
        self.is_unavailable = False
        self._sender, self._store, self._folder = sender, store, folder
        self._interval, self._max_interval = interval, max_interval
        self._closing = threading.Event()
        # In the context of the caller: the lines of one backbone among several carry its name.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="mlflow-upload", daemon=True)
        self._thread.start()

    def request_end(self) -> None:
        """Begin the last round."""
        if not self._closing.is_set():
            self._sender.begin_end()
            self._closing.set()

    def close(self, idle_timeout: float, timeout: float) -> bool:
        """Send what is left. True if the last round came to its end without a failure.

        Waits at most `timeout` seconds, and at most `idle_timeout` seconds in which the store takes nothing.
        """
        start = time.monotonic()
        self.request_end()
        while self._thread.is_alive():
            now = time.monotonic()
            left = min(start + timeout, max(start, self._sender.last_progress) + idle_timeout) - now
            if left <= 0:
                self._sender.cancel()
                return False
            self._thread.join(min(left, 0.2))
        return not self.is_unavailable

    def abandon(self) -> None:
        """Send nothing more; an upload that is under way is not waited for."""
        self._sender.cancel()
        self._closing.set()

    def _run(self) -> None:
        pause, closing = self._interval, False
        while not closing:
            closing = self._closing.wait(pause)
            try:
                self._sender.send(final=closing)
            except Exception as error:  # no error of a store's client may reach the training
                pause = min(2 * pause, self._max_interval)
                if not self.is_unavailable:
                    log.warning(
                        "MLflow at %s does not take what the run records (%s); the run goes on, and what it records is "
                        "kept in %s and sent later",
                        self._store,
                        summarize_error(error),
                        self._folder,
                    )
                self.is_unavailable = True
            else:
                pause = self._interval
                if self.is_unavailable:
                    log.warning("MLflow at %s is reachable again; everything was sent", self._store)
                self.is_unavailable = False
