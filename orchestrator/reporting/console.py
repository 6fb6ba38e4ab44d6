"""Progress of trainings: a live display on a terminal, one line an epoch elsewhere; metrics go to the tracker."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
import threading
import time
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from bim.orchestrator.text import duration, short_number
from bim.orchestrator.training.callbacks import EpochReport

log = logging.getLogger(__name__)

MIN_REPORTED_WAIT = 0.02
"""Fraction of an epoch's time from which on waiting for mask plans is reported."""

STATUS_WIDTH = 56
"""Columns of the longest usual status and the gaps beside it."""

WIDTH = 100
"""Columns of the live display and of a line, at most."""


@functools.cache
def console() -> Console:
    """The console of the live display; lines that are printed meanwhile appear above it. If `quiet`, there is none."""
    return Console(highlight=False)


class MetricSink(Protocol):
    """Keeps metrics; `bim.orchestrator.tracking.tracker.Tracker` is one. Must not raise."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None: ...

    def rewind(self, step: int, prefix: str = "") -> None: ...


class Progress:
    """Training callback; as a context manager it shows its training in the live display, if there is one.

    Log records of epochs that the display shows have the attribute `in_live_display`.

    Args:
        series: prefix of the metric names of a second training in the same run ("mae").
        label: name of the training in the display, among several.
        total_steps: optimizer steps of the training; 0 if unknown.
    """

    def __init__(self, sink: MetricSink, series: str = "", label: str = "", total_steps: int = 0) -> None:
        self.label = label
        self.started = False
        """Whether the stages were restored once, ready to train."""
        self.scores = ""
        """The newest scores of the depths, as text."""
        self._sink, self._total_steps = sink, total_steps
        self._metric_prefix = f"{series}/" if series else ""
        self._report: EpochReport | None = None
        self._step = 0
        self._losses: dict[int, float] = {}
        self._images_per_s = 0.0
        self._start: tuple[float, int] | None = None
        self._eta_at = 0.0

    def __enter__(self) -> Self:
        _display.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if _display.remove(self) and self._report is not None:
            line = epoch_line(self._report)
            console().print(f"{self.label}  {line}".lstrip(), markup=False, soft_wrap=True)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._sink.log_metrics(step, {self._metric_prefix + name: value for name, value in metrics.items()})
        losses = {name[5:-5]: value for name, value in metrics.items() if name.endswith("/loss")}
        self._losses = {int(block): value for block, value in losses.items()}
        self._step, self._images_per_s = step, metrics.get("images_per_s", 0.0)
        if self._report is None and self._total_steps and self._start is not None:
            now, (time_s, first_step) = time.monotonic(), self._start
            self._eta_at = now + (now - time_s) * (self._total_steps - step) / max(1, step - first_step)

    def on_epoch(self, report: EpochReport) -> None:
        self._report, self._eta_at = report, time.monotonic() + report.eta_s
        log.info(epoch_line(report), extra={"in_live_display": _display.shows(self)})

    def on_checkpoint(self, step: int) -> None: ...

    def on_rewind(self, step: int) -> None:
        self.started, self._step, self._start = True, step, (time.monotonic(), step)
        self._sink.rewind(step, self._metric_prefix)

    def status(self) -> str:
        """`epoch 3/60  1240 img/s  data wait 2%  ETA 1 min 12 s`, as far as it is known."""
        report, parts = self._report, []
        if report is not None:
            parts.append(f"epoch {report.epoch}/{report.epochs}")
        elif self._total_steps:
            parts.append(f"step {self._step}/{self._total_steps}")
        if self._images_per_s:
            parts.append(f"{short_number(self._images_per_s)} img/s")
        if report is not None:
            parts += _waits(report)
        if self._eta_at:
            parts.append(f"ETA {duration(max(0.0, self._eta_at - time.monotonic()))}")
        return "  ".join(parts)

    def rows(self, label_width: int, columns: int) -> list[RenderableType]:
        """The lines of the live display: bar and status, the loss of every block, the newest scores."""
        done, total = self._step, self._total_steps
        if not total and self._report is not None:
            done, total = self._report.epoch, self._report.epochs
        bar_width = max(6, min(24, columns - label_width - STATUS_WIDTH))
        bar = ProgressBar(total or None, done, bar_width, pulse=not total)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(*[self.label.ljust(label_width)] * (label_width > 0), bar, self.status())
        texts = filter(None, (_losses(self._losses) if self._losses else "", self.scores))
        return [line, *(Padding(text, (0, 0, 0, 2)) for text in texts)]


class _LiveDisplay:
    """The trainings of this process that are in progress; a single `Live` shows all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trainings: list[Progress] = []
        self._live: Live | None = None

    def add(self, training: Progress) -> None:
        with self._lock:
            self._trainings.append(training)
            if self._live is None and console().is_interactive and not console().quiet:
                # Lines on a stderr that is redirected to a file stay there.
                self._live = Live(
                    self, console=console(), transient=True, redirect_stderr=sys.stderr.isatty()
                )
                self._live.start()
                atexit.register(self.close)

    def remove(self, training: Progress) -> bool:
        """Take a training off the display. True if it was shown."""
        with self._lock:
            shown = self._live is not None and training in self._trainings
            self._trainings.remove(training)
        if not self._trainings:
            self.close()
        return shown

    def shows(self, training: Progress) -> bool:
        return self._live is not None and training in self._trainings

    def close(self) -> None:
        """Give the terminal back: at the end, and at exit if a training could not leave its context."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
                atexit.unregister(self.close)

    def __rich__(self) -> RenderableType:
        trainings = list(self._trainings)
        columns = min(WIDTH, console().width)
        label_width = max((len(training.label) for training in trainings), default=0)
        rows = Group(*(row for training in trainings for row in training.rows(label_width, columns)))
        return Constrain(rows, columns)


_display = _LiveDisplay()


def epoch_line(report: EpochReport) -> str:
    """`epoch 12/60  loss by block 0.731 0.702 0.698 0.695  1240 img/s  data wait 2%  ETA 1 min 12 s`

    If that is longer than 100 columns it has the losses of the first and the last block alone.
    """
    epoch = f"epoch {report.epoch:{len(str(report.epochs))}d}/{report.epochs}"
    parts = [f"{short_number(report.images_per_s)} img/s", *_waits(report), f"ETA {duration(report.eta_s)}"]
    line = "  ".join([epoch, _losses(report.losses), *parts])
    if len(line) <= WIDTH:
        return line
    first, last = min(report.losses), max(report.losses)
    ends = f"loss {report.losses[first]:.3f} ... {report.losses[last]:.3f}"
    return "  ".join([epoch, ends, *parts])


def _losses(losses: dict[int, float]) -> str:
    name = "loss by block" if len(losses) > 1 else "loss"
    return " ".join([name, *(f"{losses[block]:.3f}" for block in sorted(losses))])


def _waits(report: EpochReport) -> list[str]:
    waits = [f"data wait {report.data_wait:.0%}"]
    waits += [f"mask wait {report.mask_wait:.0%}"] * (report.mask_wait >= MIN_REPORTED_WAIT)
    return waits + [f"slow: {report.slow_stage}"] * (report.slow_stage is not None)
