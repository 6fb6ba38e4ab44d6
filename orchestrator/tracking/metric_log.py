"""Metrics on their way: the file `metrics.jsonl`, which is the truth, and the position up to which a store has it.

The training appends a line and goes on; a background thread (`delivery.py`) reads the file behind it. A store that is away
therefore costs no memory and loses nothing: the position in the file waits. Knows no MLflow; serves `tracking.py`.
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

from bim.orchestrator.tracking.records import MetricPoint

log = logging.getLogger(__name__)

BATCH = 1000
"""Points per delivery; MLflow takes no more in one request."""


class MetricLog:
    """`metrics.jsonl`: one object per line, `{"step": 120, "time": 1712.5, "block0/loss": 0.41, ...}`.

    A metric has one value per step, and its steps come in order: `rewind` cuts the tail off before the training
    repeats it, or else the last value written counts. Values that are not finite are written as the strings "nan",
    "inf" and "-inf", since JSON has no numbers for them. One thread appends and rewinds, another may deliver.

    Beside it `metrics.sent.json` holds the highest step per metric that a store has received.

    Args:
        path: of the file; what an earlier process wrote stays.
        same_store: whether the deliveries of an earlier process went to where these will go, too.
    """

    def __init__(self, path: Path, same_store: bool = False) -> None:
        self.path = path
        self._marks = path.with_name("metrics.sent.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._lock = threading.Lock()
        self._position = 0  # bytes of the file that have been delivered
        self._cuts = 0  # how often the file was cut: a position from before a cut is void
        self._delivered: dict[str, int] = _marks(self._marks) if same_store else {}
        self._lost = False
        self._cut_to(_whole_lines(path))
        if not same_store:
            self._marks.unlink(missing_ok=True)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line. Never raises: a full disk is said once and the training goes on."""
        try:
            line = json.dumps({"step": int(step), "time": round(time.time(), 3), **_writable(values)})
            with self._lock, self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
        except (OSError, TypeError, ValueError) as error:
            if not self._lost:
                self._lost = True
                log.warning("metrics of step %s could not be written to %s (%s)", step, self.path, error)

    def rewind(self, step: int, prefix: str = "") -> None:
        """Forget what came after `step`, from where the training is about to go on.

        prefix: of the metrics of a second training recorded behind the first ("mae/"), whose steps begin anew.
        """
        with self._lock, self.path.open("rb") as file:
            keep = 0
            for line in file:
                row = _row(line)
                if (
                    row is not None
                    and row["step"] > step
                    and any(name.startswith(prefix) for name in _names(row))
                ):
                    break
                keep += len(line)
        self._cut_to(keep)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric over the whole run, in order."""
        with self.path.open("rb") as file:
            rows = (_row(line) for line in file)
            values = {row["step"]: float(row[name]) for row in rows if row is not None and name in row}
        return sorted(values.items())

    def deliver(self, send: Callable[[Sequence[MetricPoint]], None]) -> int:
        """Send what is new, in order, in batches; returns the number of points.

        What `send` raises is passed on, and the batch that it was given is sent again at the next call.
        """
        sent = 0
        try:
            for batch in self._batches():
                send(batch)
                sent += len(batch)
                for point in batch:
                    self._delivered[point.name] = max(point.step, self._delivered.get(point.name, point.step))
        finally:
            if sent:
                self._keep_marks()
        return sent

    def _batches(self) -> Iterator[list[MetricPoint]]:
        """What has not been delivered; the position moves on when the next batch is asked for."""
        while True:
            with self._lock:
                position, cuts = self._position, self._cuts
                points, end = self._read(position)
            if end == position:
                return
            if points:
                yield points
            with self._lock:
                if cuts == self._cuts:
                    self._position = end

    def _keep_marks(self) -> None:
        # Lost marks cost points that are sent twice, no more.
        with contextlib.suppress(OSError):
            fresh = self._marks.with_suffix(".tmp")
            fresh.write_text(json.dumps(self._delivered), encoding="utf-8")
            fresh.replace(self._marks)

    def _read(self, position: int) -> tuple[list[MetricPoint], int]:
        points: list[MetricPoint] = []
        with self.path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                new = self._points(line)
                if points and len(points) + len(new) > BATCH:
                    break
                points += new
                position += len(line)
        return points, position

    def _points(self, line: bytes) -> list[MetricPoint]:
        row = _row(line)
        if row is None:
            return []
        step, milliseconds = row.pop("step"), int(1000 * row.pop("time", time.time()))
        return [
            MetricPoint(name, step, float(value), milliseconds)
            for name, value in row.items()
            # The repeated steps of a resumed run equal those in the store; twice would only crowd its charts.
            if step > self._delivered.get(name, -1)
        ]

    def _cut_to(self, size: int) -> None:
        with self._lock:
            if size < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(size)
                self._position = min(self._position, size)
                self._cuts += 1


def _writable(values: Mapping[str, float]) -> dict[str, float | str]:
    numbers = {name: float(value) for name, value in values.items()}
    return {
        name: v if v - v == 0 else str(v) for name, v in numbers.items()
    }  # inf - inf and nan - nan are nan


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError):
        return None  # a line cut short when an earlier process was killed
    return row


def _marks(path: Path) -> dict[str, int]:
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(step) for name, step in marks.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _names(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name not in ("step", "time")]


def _whole_lines(path: Path) -> int:
    """Size of the file without a last line that was cut short."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
