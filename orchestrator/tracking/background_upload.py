"""Getting things to a store that may be away: the background thread for metrics, and what is owed for the end.

Nothing here raises or blocks on account of the store. Knows no MLflow; serves `tracking.py`.
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
"""Seconds in which a store that has just failed is not asked again by the caller's own thread."""


class BackgroundUploader:
    """The one background thread: does its jobs every `interval` seconds, and a last time when it is closed.

    While they fail it waits longer, up to `patience` seconds. The first failure is one line in the log, the
    recovery another; nothing is ever raised.
    """

    def __init__(
        self,
        jobs: Sequence[Callable[[], object]],
        store: str,
        kept: str,
        interval: float = 2.0,
        patience: float = 60.0,
    ) -> None:
        self.down = False
        self._jobs, self._store, self._kept = jobs, store, kept
        self._interval, self._patience = interval, patience
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-courier", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Deliver what is left, for at most `timeout` seconds. True if all of it arrived."""
        self._closing.set()
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self.down

    def _run(self) -> None:
        pause = self._interval
        closing = False
        while not closing:
            closing = self._closing.wait(pause)
            try:
                for job in self._jobs:
                    job()
            except Exception as error:  # whatever a store's client raises must not reach the training
                pause = min(2 * pause, self._patience)
                if not self.down:
                    self.down = True
                    log.warning(
                        "MLflow at %s does not take metrics (%s); training goes on, they are kept in %s "
                        "and sent when it is back",
                        self._store,
                        summarize_error(error),
                        self._kept,
                    )
            else:
                pause = self._interval
                if self.down:
                    self.down = False
                    log.warning(
                        "MLflow at %s is back; the metrics kept in %s were sent", self._store, self._kept
                    )


class RetryQueue:
    """Jobs that a store did not take when they came up. They are tried again, in order, when the run ends.

    A job must be repeatable: it may fail half-way.

    Args:
        store: its address, for messages.
        hopeless: whether an error says that the store is there and the job is at fault, so that others need not wait.
        away: whether the store is known to be away, so that it need not be asked.
    """

    def __init__(
        self,
        store: str,
        is_permanent_error: Callable[[Exception], bool],
        away: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store, self._hopeless, self._away = store, is_permanent_error, away
        self._jobs: list[tuple[str, Callable[[], object]]] = []
        self._asleep_until = 0.0

    @property
    def open(self) -> list[str]:
        """What the store has not taken yet."""
        return [what for what, _ in self._jobs]

    def do(self, what: str, job: Callable[[], Result]) -> Result | None:
        """The result of the job, or None if it is owed now; the reason is one line in the log."""
        if time.monotonic() >= self._asleep_until and not self._away():
            try:
                return job()
            except Exception as error:  # each kind of store has its own errors
                log.warning("MLflow at %s did not take %s (%s)", self._store, what, summarize_error(error))
                if not self._hopeless(error):
                    self._asleep_until = time.monotonic() + RETRY_BACKOFF_S
        self._jobs.append((what, job))
        return None

    def settle(self) -> bool:
        """Try all of them once more, until the store fails. True if nothing is owed any more."""
        jobs, self._jobs, self._asleep_until = self._jobs, [], 0.0
        for what, job in jobs:
            self.do(what, job)
        return not self._jobs
