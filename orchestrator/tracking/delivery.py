"""What a run has recorded and its store has not taken yet, sent in order. Serves the run itself and `bim sync`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.open_run import is_duplicate_row, is_refusal
from bim.orchestrator.tracking.run_writer import RunWriter, UnknownUpload
from bim.orchestrator.tracking.store import summarize_error
from bim.orchestrator.tracking.upload_queue import Upload, UploadQueue

FAILURES_TO_GIVE_UP = 2
"""Failures in a row that end a round: one may be of a single upload, another one says that the store is unavailable."""

EVENTS, EVENTS_INTERVAL_S = "events.log", 30.0
"""The log of a run, and seconds between two uploads of it: it is sent as a whole."""

log = logging.getLogger(__name__)


class Delivery:
    """Sends metrics, uploads and the log of events. One thread sends, others may add and cancel.

    Args:
        out: the output directory of the run.
    """

    def __init__(self, out: Path, metrics: MetricLog, queue: UploadQueue, writer: RunWriter) -> None:
        self.num_sent = 0
        """Metrics and uploads that the store has taken."""
        self.last_progress = time.monotonic()
        """When it took the last one."""
        self._metrics, self._queue, self._writer = metrics, queue, writer
        self._events, self._events_size, self._events_time = out / EVENTS, 0, 0.0
        self._cancelled = threading.Event()
        self._ends: dict[int, Future[None]] = {}

    def send(self, final: bool = False) -> None:
        """Send all there is. An upload that fails is left for the next call, one that the store refuses is dropped.

        Args:
            final: whether nothing comes after it.

        Raises:
            Exception: the last error of the store; something is left then.
        """
        failure: Exception | None = None
        in_a_row = 0
        for job in self._jobs(final):
            if self._cancelled.is_set():
                return
            try:
                job()
            except Exception as error:  # each kind of store has its own errors
                failure, in_a_row = error, in_a_row + 1
                if in_a_row == FAILURES_TO_GIVE_UP:
                    break
            else:
                in_a_row = 0
        if failure is not None:
            raise failure

    def begin_end(self) -> None:
        """Start to send the uploads that go before all others, side by side and beside a `send` that is under way.

        Where every request takes long, the runs of a process that is told to stop end in the time of one of them.
        """
        for upload in self._queue.waiting():
            if upload.first and upload.number not in self._ends:
                end = self._ends[upload.number] = Future[None]()
                threading.Thread(
                    target=self._send_end, args=(upload, end), name=f"mlflow-end-{upload.number}", daemon=True
                ).start()

    def _send_end(self, upload: Upload, end: Future[None]) -> None:
        try:
            self._send_upload(upload)
        except BaseException as error:
            del self._ends[upload.number]  # `send` tries it once more
            end.set_exception(error)
        else:
            end.set_result(None)

    def cancel(self) -> None:
        """End a `send` that is under way before its next upload."""
        self._cancelled.set()

    def _jobs(self, final: bool) -> Iterator[Callable[[], None]]:
        """What is to be done next, which an upload that is added meanwhile may change."""
        tried, with_metrics = set[int](), False
        while True:
            uploads = [
                upload for upload in self._queue.waiting() if upload.number not in tried | self._ends.keys()
            ]
            if not with_metrics and not (uploads and uploads[0].first):
                with_metrics = True
                yield self._send_metrics
            elif uploads:
                upload = uploads[0]
                tried.add(upload.number)
                yield lambda: self._send_upload(upload)  # noqa: B023 - called before the next one is taken
            else:
                break
        for end in list(self._ends.values()):
            yield end.result
        if final or time.monotonic() - self._events_time > EVENTS_INTERVAL_S:
            yield self._send_events

    def _send_metrics(self) -> None:
        self._took(self._metrics.deliver(self._writer.metrics))

    def _send_upload(self, upload: Upload) -> None:
        try:
            self._write(upload)
        except Exception as error:
            if not is_refusal(error) and not isinstance(error, UnknownUpload):
                raise
            log.warning("MLflow does not take %s: %s", upload.name, summarize_error(error))
            self._queue.remove(upload)
        else:
            self._queue.remove(upload)
            self._took(1)

    def _write(self, upload: Upload) -> None:
        try:
            self._writer.send(upload.kind, upload.arguments)
        except Exception as error:
            if not is_duplicate_row(error):
                raise
            self._writer.send(upload.kind, upload.arguments)

    def _send_events(self) -> None:
        size = self._events.stat().st_size if self._events.exists() else 0
        if size != self._events_size:
            self._writer.file(EVENTS)
            self._events_size, self._events_time = size, time.monotonic()

    def _took(self, number: int) -> None:
        self.num_sent += number
        if number:
            self.last_progress = time.monotonic()
