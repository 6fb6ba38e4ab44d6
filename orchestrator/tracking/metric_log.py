"""The file `metrics.jsonl`, which is the source of truth for metrics, and the offset up to which a store has received it.

The training appends a line and goes on; a background thread reads the file behind it. A store that is unavailable
therefore costs no memory and loses nothing: the offset stays where it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bim.orchestrator.files import atomic_write, make_folder, storage_errors
from bim.orchestrator.tracking.records import MetricPoint

log = logging.getLogger(__name__)

BATCH = 1000
"""Metrics that MLflow takes in one request."""

MAX_UNWRITTEN = 10_000
"""Lines that are kept while the file system takes none; the oldest go first."""


class MetricLog:
    """`metrics.jsonl`: one object per line, `{"step": 120, "time": 1712.5, "block0/loss": 0.41, ...}`.

    A metric has one value per step, and its steps come in order: `rewind` truncates the file before the training
    repeats them, or else the last value written counts. Values that are not finite are written as the strings "nan",
    "inf" and "-inf", since JSON has no numbers for them. One thread appends and rewinds, another may deliver.

    Beside it `metrics.sent.json` holds the highest step per metric that a store has received.

    Args:
        path: of the file; what an earlier process wrote stays.
        same_store: whether an earlier process delivered to the store of this one.
    """

    def __init__(self, path: Path, same_store: bool = False) -> None:
        self.path = path
        self._sent_steps_path = path.with_name("metrics.sent.json")
        make_folder(path.parent)
        with storage_errors(path):
            path.touch()
        self._lock = threading.Lock()
        self._unwritten: deque[bytes] = deque(maxlen=MAX_UNWRITTEN)
        self._sent_offset = 0  # bytes of the file that have been delivered
        self._truncations = 0  # an offset read before a truncation is not valid after it
        self._sent_steps: dict[str, int] = _read_sent_steps(self._sent_steps_path) if same_store else {}
        self._write_failed = False
        with storage_errors(path, "read"):
            end = path.read_bytes().rfind(b"\n") + 1
        self._truncate(end)  # a last line that a kill cut short goes
        if not same_store:
            with storage_errors(self._sent_steps_path, "removed"):
                self._sent_steps_path.unlink(missing_ok=True)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line, whole or not at all. Never raises.

        A line that the file system refuses is written before the next one that it takes; the next checkpoint ends the run
        if it refuses that too.
        """
        try:
            line = json.dumps({"step": int(step), "time": round(time.time(), 3), **_json_values(values)})
        except (TypeError, ValueError) as error:
            self._warn(step, str(error))
            return
        try:
            with self._lock:
                self._unwritten.append(line.encode() + b"\n")
                self._write()
        except OSError as error:
            self._warn(step, f"{error.strerror or error}; they are kept and written later")
        else:
            self._write_failed = False

    def _warn(self, step: int, cause: str) -> None:
        """One line until a line is written again."""
        if not self._write_failed:
            self._write_failed = True
            log.warning("metrics of step %s could not be written to %s (%s)", step, self.path, cause)

    def _write(self) -> None:
        """Append the lines that are not in the file yet; all of them, or none and an OSError."""
        lines = b"".join(self._unwritten)
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(lines) != len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        self._unwritten.clear()

    def rewind(self, step: int, prefix: str = "") -> None:
        """Drop the metrics after `step`, from which the training is about to continue.

        prefix: of the metrics of a second training recorded behind the first ("mae/"), whose steps start from 0 again.
        """
        size = 0
        with self._lock, storage_errors(self.path, "read"), self.path.open("rb") as file:
            self._unwritten.clear()  # lines of steps that are repeated
            for line in file:
                row = _parse(line)
                if row is not None and row["step"] > step and any(n.startswith(prefix) for n in _names(row)):
                    break
                size += len(line)
        self._truncate(size)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric over the whole run, in order. Raises StorageError."""
        with storage_errors(self.path, "read"), self.path.open("rb") as file:
            rows = (_parse(line) for line in file)
            values = {row["step"]: float(row[name]) for row in rows if row is not None and name in row}
        return sorted(values.items())

    def deliver(self, send: Callable[[Sequence[MetricPoint]], None]) -> int:
        """Send what is new, in order, in batches; returns the number of points.

        What `send` raises is passed on, and the batch that it was given is sent again at the next call.
        """
        num_sent = 0
        try:
            for batch in self._batches():
                send(batch)
                num_sent += len(batch)
                for point in batch:
                    self._sent_steps[point.name] = max(
                        point.step, self._sent_steps.get(point.name, point.step)
                    )
        finally:
            if num_sent:
                with contextlib.suppress(OSError):  # without this file points are sent twice, no more
                    atomic_write(self._sent_steps_path, json.dumps(self._sent_steps))
        return num_sent

    def _batches(self) -> Iterator[list[MetricPoint]]:
        """What has not been delivered; the offset moves on when the next batch is asked for."""
        while True:
            with self._lock:
                offset, truncations = self._sent_offset, self._truncations
                points, end = self._read(offset)
            if end == offset:
                return
            if points:
                yield points
            with self._lock:
                if truncations == self._truncations:
                    self._sent_offset = end

    def _read(self, offset: int) -> tuple[list[MetricPoint], int]:
        """At most `BATCH` points behind an offset in the file, and the offset behind them."""
        points: list[MetricPoint] = []
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                new = self._points(line)
                if points and len(points) + len(new) > BATCH:
                    break
                points += new
                offset += len(line)
        return points, offset

    def _points(self, line: bytes) -> list[MetricPoint]:
        row = _parse(line)
        if row is None:
            return []
        step, milliseconds = row["step"], int(1000 * row.get("time", time.time()))
        return [
            MetricPoint(name, step, float(row[name]), milliseconds)
            for name in _names(row)
            # The repeated steps of a resumed run equal those in the store; twice would only crowd its charts.
            if step > self._sent_steps.get(name, -1)
        ]

    def _truncate(self, size: int) -> None:
        with self._lock, storage_errors(self.path):
            if size < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(size)
                self._sent_offset = min(self._sent_offset, size)
                self._truncations += 1


def _json_values(values: Mapping[str, float]) -> dict[str, float | str]:
    numbers = {name: float(value) for name, value in values.items()}
    return {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line as a row of numbers; None if it was cut short by a kill, or is anything else."""
    try:
        row = json.loads(line)
        return {name: int(value) if name == "step" else float(value) for name, value in row.items()} | {
            "step": int(row["step"])
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _read_sent_steps(path: Path) -> dict[str, int]:
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(step) for name, step in steps.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _names(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name not in ("step", "time")]
