"""One backbone on its way through a job: what it runs on, where it is recorded, what came out of it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.evaluation.metric_info import METRICS, RANKED_BY
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.files import StorageError, atomic_write
from bim.orchestrator.jobs.evaluation_task import EvaluationTask
from bim.orchestrator.reporting.log import line_prefix
from bim.orchestrator.runs.lease import Lease, LeaseLostError
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun
from bim.orchestrator.runs.provenance import Machine, Provenance
from bim.orchestrator.text import redact
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.spec import Precision

USER_FACING_ERRORS = (TrainingError, DataError, OutputError, PlacementError, StorageError)
"""Errors whose message is meant for the person who started the run."""

BASELINE_SERIES = "mae"
"""Begins the metrics, child runs and lines of a baseline."""

log = logging.getLogger(__name__)


@dataclass
class BackboneRun:
    """The state of one backbone. Its training thread writes, the main thread reads what is complete.

    Args:
        layouts: of the stages of each of `prepared.runs`.
        label: begins its lines among several backbones.
        tasks, evaluations: one for each of `prepared.runs` that is trained and evaluated.
        latency_pending: whether its latencies are measured when nothing else runs any more.
        failed: why it did not come to its end, in a sentence.
        table: its results as text.
        num_recorded: how many of `evaluations` are in MLflow.
        closed: whether its record is complete, be it of a failure.
        lease: of its output directory.
    """

    prepared: PreparedBackbone
    layouts: list[StageLayout]
    precision: Precision
    provenance: Provenance
    tracker: Tracker
    label: str = ""
    tasks: list[EvaluationTask] = field(default_factory=list)
    evaluations: list[EvaluationResult] = field(default_factory=list)
    latency_pending: bool = False
    failed: str | None = None
    table: str = ""
    num_recorded: int = 0
    closed: bool = False
    lease: Lease | None = None

    @property
    def name(self) -> str:
        return self.prepared.name

    @property
    def out(self) -> Path:
        return self.prepared.run.out

    @property
    def placements(self) -> list[tuple[ResolvedRun, StageLayout]]:
        """What is trained, in this order, and where."""
        return list(zip(self.prepared.runs, self.layouts, strict=True))

    @property
    def evaluated(self) -> bool:
        """Whether everything of it was trained and evaluated."""
        return len(self.evaluations) == len(self.layouts)

    def series_of(self, run: ResolvedRun) -> str:
        """The series of metrics and child runs that one of `prepared.runs` has."""
        return BASELINE_SERIES if run is self.prepared.baseline else ""

    def record_machines(self, machines: Sequence[Machine]) -> None:
        """Record the machines of the stages, which may be others than that of the driver."""
        if not self.provenance.stages:
            self.provenance = replace(self.provenance, stages=tuple(machines))
            self.tracker.log_provenance(self.provenance)

    def lines(self) -> AbstractContextManager[None]:
        """Inside, the lines of this thread are those of this backbone."""
        return line_prefix(self.label)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Inside, an error of one of several backbones is its own failure; that of a single one is raised."""
        try:
            yield
        except Exception as error:
            if not self.name:
                raise
            record_failure(self, error)


def record_failure(backbone: BackboneRun, error: Exception) -> None:
    """Log why in a line; of an error that is not user-facing keep the traceback in `failure.txt`."""
    backbone.failed = format_error(error)
    if isinstance(error, LeaseLostError):
        backbone.tracker.abandon()
        backbone.closed = True
    with suppress(OSError):
        _traceback_file(backbone).unlink(missing_ok=True)
    if not isinstance(error, USER_FACING_ERRORS):
        text = redact("".join(traceback.format_exception(error))).encode(errors="backslashreplace")
        with suppress(OSError):  # the line below is the record, also on a full disk
            atomic_write(_traceback_file(backbone), text)
    log.info("failed: %s", backbone.failed)


def clear_failure(backbone: BackboneRun) -> None:
    """Remove what an earlier process left of a failure that this one has got over; `events.log` keeps its line."""
    with suppress(OSError):
        _traceback_file(backbone).unlink(missing_ok=True)
    backbone.tracker.remove_tag("failed")


def format_error(error: Exception) -> str:
    """An error in one line, for the user; one that is not user-facing begins with its type."""
    lines = redact(str(error)).strip().splitlines() or ["no error message"]
    return " ".join(lines) if isinstance(error, USER_FACING_ERRORS) else f"{type(error).__name__}: {lines[0]}"


def scores_line(reports: tuple[DepthReport, ...]) -> str:
    """`kNN top-1 by depth 41.0, 52.3 %`, of what was measured."""
    measured = [report.metrics() for report in reports]
    for metric in (METRICS[key] for key in RANKED_BY):
        if all(metric.key in values for values in measured):
            return metric.by_depth(values[metric.key] for values in measured)
    return f"measured and exported {len(reports)} depths"


def _traceback_file(backbone: BackboneRun) -> Path:
    return backbone.out / "failure.txt"
