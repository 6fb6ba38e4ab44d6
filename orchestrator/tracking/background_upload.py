"""Upload to a store that may be unavailable: a background thread for metrics, a queue of failed jobs for the end of a run.

Nothing here raises or blocks because of the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from bim.orchestrator.tracking.store import summarize_error

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY_BACKOFF_S = 30.0
"""Seconds in which the caller's own thread sends nothing to a store that has just failed."""


class BackgroundUploader:
    """A thread that runs its jobs every `interval` seconds, and a last time when it is closed.

    While they fail it waits longer, up to `max_interval` seconds. The first failure is one line in the log, the
    recovery another; nothing is ever raised.

    Args:
        store, folder: address of the store and where its files are kept meanwhile, for messages.
    """

    def __init__(
        self,
        jobs: Sequence[Callable[[], object]],
        store: str,
        folder: str,
        interval: float = 2.0,
        max_interval: float = 60.0,
    ) -> None:
        self.is_unavailable = False
        self._jobs, self._store, self._folder = jobs, store, folder
        self._interval, self._max_interval = interval, max_interval
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-upload", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Upload what is left, for at most `timeout` seconds. True if all of it arrived."""
        self._closing.set()
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self.is_unavailable

    def _run(self) -> None:
        pause, closing = self._interval, False
        while not closing:
            closing = self._closing.wait(pause)
            try:
                for job in self._jobs:
                    job()
            except Exception as error:  # no error of a store's client may reach the training
                pause = min(2 * pause, self._max_interval)
                if not self.is_unavailable:
                    log.warning(
                        "MLflow at %s is unreachable (%s); training goes on, metrics are kept in %s and sent later",
                        self._store,
                        summarize_error(error),
                        self._folder,
                    )
                self.is_unavailable = True
            else:
                pause = self._interval
                if self.is_unavailable:
                    log.warning("MLflow at %s is reachable again; all metrics were sent", self._store)
                self.is_unavailable = False


class RetryQueue:
    """Jobs that failed because of a store. They are tried again, in order, when the run ends.

    A job must be repeatable: it may fail half-way.

    Args:
        store: its address, for messages.
        is_permanent_error: whether an error says that the store answers and refuses the job, so that others need not wait.
        is_unavailable: whether the store is known to be unavailable, so that nothing is sent.
    """

    def __init__(
        self,
        store: str,
        is_permanent_error: Callable[[Exception], bool],
        is_unavailable: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._is_permanent_error, self._is_unavailable = is_permanent_error, is_unavailable
        self._jobs: list[tuple[str, Callable[[], object]]] = []
        self._backoff_until = 0.0

    @property
    def pending(self) -> list[str]:
        """Names of the jobs that have not succeeded yet."""
        return [name for name, _ in self._jobs]

    def submit(self, name: str, job: Callable[[], Result]) -> Result | None:
        """The result of the job, or None if it is pending now; the reason is one line in the log."""
        if time.monotonic() >= self._backoff_until and not self._is_unavailable():
            try:
                return job()
            except Exception as error:  # each kind of store has its own errors
                log.warning("MLflow at %s: %s not uploaded (%s)", self._store, name, summarize_error(error))
                if not self._is_permanent_error(error):
                    self._backoff_until = time.monotonic() + RETRY_BACKOFF_S
        self._jobs.append((name, job))
        return None

    def flush(self) -> bool:
        """Try all of them once more, until the store fails. True if none is pending any more."""
        jobs, self._jobs, self._backoff_until = self._jobs, [], 0.0
        for name, job in jobs:
            self.submit(name, job)
        return not self._jobs
