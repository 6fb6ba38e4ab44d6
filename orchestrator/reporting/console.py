"""What a person reads while a run trains: one line per epoch, one sentence per event. Also hands numbers to the tracker.

Prints nothing by itself: the caller gives the function that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bim.orchestrator.text import duration
from bim.orchestrator.training.callbacks import EpochReport

MIN_REPORTED_WAIT = 0.02
"""Share of an epoch's time from which on waiting for plans of masks is told."""


class MetricSink(Protocol):
    """Where numbers and events are kept; `bim.orchestrator.tracking.tracker.Tracker` is one. Must not raise."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None: ...

    def log_event(self, text: str) -> None: ...

    def rewind(self, step: int, prefix: str = "") -> None: ...


class Progress:
    """A listener of the training loop.

    Args:
        say: takes one line for the reader.
        prefix: put before metric names and lines, for a second run beside the first ("mae").
    """

    def __init__(self, say: Callable[[str], None], sink: MetricSink, prefix: str = "") -> None:
        self._say, self._sink = say, sink
        self._metric_prefix = f"{prefix}/" if prefix else ""
        self._line_prefix = f"{prefix}  " if prefix else ""
        self.started = False
        """Whether the stages have stood once, ready to train."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._sink.log_metrics(step, {self._metric_prefix + name: value for name, value in metrics.items()})

    def on_epoch(self, report: EpochReport) -> None:
        self._say(self._line_prefix + epoch_line(report))

    def on_checkpoint(self, step: int) -> None: ...

    def on_rewind(self, step: int) -> None:
        self.started = True
        self._sink.rewind(step, self._metric_prefix)

    def say(self, text: str) -> None:
        """An event: read by the person now, and kept with the run."""
        self._say(self._line_prefix + text)
        self._sink.log_event(self._line_prefix + text)


def epoch_line(report: EpochReport) -> str:
    """`epoch 12/60  loss by block 0.731 0.702 0.698 0.695  1240 img/s  data wait 2 %  to go 1 min 12 s`

    The wait for plans of masks is there where it is worth a word.
    """
    width = len(str(report.epochs))
    losses = " ".join(f"{report.losses[k]:.3f}" for k in sorted(report.losses))
    name = "loss by block" if len(report.losses) > 1 else "loss"
    plan = f"  mask wait {report.mask_wait:.0%}" if report.mask_wait >= MIN_REPORTED_WAIT else ""
    return (
        f"epoch {report.epoch:{width}d}/{report.epochs}  {name} {losses}  {report.images_per_s:.0f} img/s  "
        f"data wait {report.data_wait:.0%}{plan}  to go {duration(report.eta_s)}"
    )
