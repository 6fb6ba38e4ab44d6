"""The progress of an evaluation as lines; that of another process comes through a file in the output directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bim.orchestrator.evaluation.progress import reported_to
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.files import atomic_write
from bim.orchestrator.jobs.evaluate_checkpoint import evaluate_checkpoint
from bim.orchestrator.jobs.evaluation_task import EvaluationTask

LINE_EVERY_S = 10.0
"""Seconds between two lines."""

WRITE_EVERY_S = 1.0
"""Seconds between two contents of the file."""

log = logging.getLogger(__name__)


class MeasuringLines:
    """Listener of an evaluation: logs a line now and then."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        """check: called at every report; it may raise to end the evaluation."""
        self._check = check
        self._due = time.monotonic() + LINE_EVERY_S
        self._last = ""

    def __call__(self, text: str) -> None:
        self._check()
        if text and text != self._last and time.monotonic() >= self._due:
            self._due = time.monotonic() + LINE_EVERY_S
            self._last = text
            log.info("measuring %s", text)


class ProgressFile:
    """Where an evaluation in another process leaves its progress. Nothing here raises: a line is worth no evaluation."""

    def __init__(self, out: Path) -> None:
        self._path = out / ".measuring.tmp"
        self._due = 0.0

    def write(self, text: str) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + WRITE_EVERY_S
            with suppress(OSError):
                atomic_write(self._path, text)

    def read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def evaluate_with_progress(task: EvaluationTask) -> EvaluationResult:
    """`evaluate_checkpoint` in a process of its own, with its progress in `ProgressFile(task.out)`."""
    with reported_to(ProgressFile(Path(task.out)).write):
        return evaluate_checkpoint(task)
