"""The file `metrics.jsonl`, which is the source of truth for metrics, and the offset up to which a store has received it.

The training appends a line and goes on; a background thread reads the file behind it. A store that is unavailable
therefore costs no memory and loses nothing: the offset stays where it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bim.orchestrator.files import atomic_write
from bim.orchestrator.tracking.records import MetricPoint

log = logging.getLogger(__name__)

BATCH = 1000
"""Metrics that MLflow takes in one request."""


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._lock = threading.Lock()
        self._sent_offset = 0  # bytes of the file that have been delivered
        self._truncations = 0  # an offset read before a truncation is not valid after it
        self._sent_steps: dict[str, int] = _read_sent_steps(self._sent_steps_path) if same_store else {}
        self._write_failed = False
        self._truncate(path.read_bytes().rfind(b"\n") + 1)  # a last line that a kill cut short goes
        if not same_store:
            self._sent_steps_path.unlink(missing_ok=True)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line. Never raises: a full disk is one line in the log and the training goes on."""
        try:
            line = json.dumps({"step": int(step), "time": round(time.time(), 3), **_json_values(values)})
            with self._lock, self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
        except (OSError, TypeError, ValueError) as error:
            if not self._write_failed:
                self._write_failed = True
                log.warning("metrics of step %s could not be written to %s (%s)", step, self.path, error)

    def rewind(self, step: int, prefix: str = "") -> None:
        """Drop the metrics after `step`, from which the training is about to continue.

        prefix: of the metrics of a second training recorded behind the first ("mae/"), whose steps start from 0 again.
        """
        size = 0
        with self._lock, self.path.open("rb") as file:
            for line in file:
                row = _parse(line)
                if row is not None and row["step"] > step and any(n.startswith(prefix) for n in _names(row)):
                    break
                size += len(line)
        self._truncate(size)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric over the whole run, in order."""
        with self.path.open("rb") as file:
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
        with self._lock:
            if size < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(size)
                self._sent_offset = min(self._sent_offset, size)
                self._truncations += 1


def _json_values(values: Mapping[str, float]) -> dict[str, float | str]:
    numbers = {name: float(value) for name, value in values.items()}
    return {
        name: x if x - x == 0 else str(x) for name, x in numbers.items()
    }  # inf - inf and nan - nan are nan


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line as a row; None if it was cut short by a kill."""
    try:
        row = json.loads(line)
        row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError):
        return None
    return row


def _read_sent_steps(path: Path) -> dict[str, int]:
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(step) for name, step in steps.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _names(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name not in ("step", "time")]
