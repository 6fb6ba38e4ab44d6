"""The depths scored while they train: a callback that has checkpoints scored, and tells when that is enough.

On Ray a checkpoint is scored in another process: in resources that no stage holds, while the training goes on; where there
are none, between two steps. A score that fails costs a line, never the training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.placement_group import LostNodeWatch, PlacementGroup
from bim.orchestrator.distributed.side_task import SideProcess, SideTask
from bim.orchestrator.evaluation.metric_info import METRICS
from bim.orchestrator.evaluation.progress import reported_to
from bim.orchestrator.files import StorageError, atomic_write, make_folder
from bim.orchestrator.jobs.backbone_run import BackboneRun, format_error
from bim.orchestrator.jobs.score_depths import (
    ScoreResult,
    ScoreTask,
    score_depths,
    score_depths_of_one_run,
    score_task,
)
from bim.orchestrator.reporting.console import Progress
from bim.orchestrator.runs.depth_scores import (
    DepthScores,
    best_scores,
    ends_early,
    read_scores,
    write_scores,
)
from bim.orchestrator.runs.lease import LeaseLostError
from bim.orchestrator.runs.output_dir import open_store
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.provenance import Machine
from bim.orchestrator.runs.resolve import epochs_between_scores
from bim.orchestrator.runs.train import training_schedule
from bim.orchestrator.text import duration
from bim.orchestrator.tracking.descriptions import SCORES_WHILE_TRAINING
from bim.orchestrator.training.callbacks import EpochReport, StopRequest
from bim.orchestrator.training.errors import ClusterLostError

POLL_S = 0.5
"""Seconds between two looks at a task that the training waits for."""

SCORE_LIMIT_S = 3600.0
"""Seconds that the training waits for the scores of a checkpoint, at most."""

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """The training is to stop, so nothing is scored any more."""


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    task: SideTask[ScoreResult]
    started: float
    """By `time.monotonic`."""


class TrainingScores:
    """Callback of one training; passes every event on to `progress`.

    Args:
        series: of the metrics of a baseline.
        placement_group: of the stages; None without Ray.
    """

    def __init__(
        self,
        progress: Progress,
        backbone: BackboneRun,
        run: ResolvedRun,
        layout: StageLayout,
        placement_group: PlacementGroup | None,
        stop: StopRequest,
        series: str = "",
    ) -> None:
        self._progress, self._backbone, self._run, self._layout = progress, backbone, run, layout
        self._placement_group, self._stop, self._series = placement_group, stop, series
        self._process = None if placement_group is None else SideProcess(layout, placement_group)
        self.every_epochs = epochs_between_scores(run.settings)
        self._schedule = replace(training_schedule(run, layout), score_epochs=self.every_epochs)
        self._patience = run.settings.evaluation.patience
        self._scores = _scores_so_far(run) if run.settings.resume else {}
        self._pending: _Pending | None = None
        self._visible_gpus: str | None = None
        self._uses_free_resources = True
        """Whether free resources are used; not after a failure there."""

    @property
    def started(self) -> bool:
        return self._progress.started

    @property
    def has_ended(self) -> bool:
        """Whether the training needs no further step."""
        return ends_early(self._ordered, self._patience)

    @property
    def best(self) -> DepthScores | None:
        """The best scores so far."""
        return best_scores(self._ordered, self._patience)

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step stays: the best one, and one that is being scored."""
        pending, best = self._pending, self.best
        return (pending is not None and step == pending.step) or (best is not None and step == best.step)

    def on_machines(self, machines: Sequence[Machine]) -> None:
        """The machines of the stages, first stage first."""
        self._visible_gpus = machines[0].visible_gpus
        self._backbone.record_machines(machines)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._progress.on_step(step, metrics)
        self._collect()

    def on_epoch(self, report: EpochReport) -> None:
        self._progress.on_epoch(report)

    def on_checkpoint(self, step: int) -> bool:
        self._progress.on_checkpoint(step)
        self._score_if_due(step)
        return self.has_ended

    def on_rewind(self, step: int) -> None:
        self._progress.on_rewind(step)
        self._scores = {scored: scores for scored, scores in self._scores.items() if scored <= step}
        self._score_if_due(step)

    def finish(self) -> None:
        """Wait for scores that are not there yet, unless the training is to stop."""
        with suppress(_Stopped):
            self._wait()

    def close(self) -> None:
        """End a score that is being computed, and the process that computes scores."""
        self._cancel()
        if self._process is not None:
            self._process.close()

    def _cancel(self) -> None:
        if self._pending is not None:
            self._pending.task.cancel()
            self._pending = None

    @property
    def _ordered(self) -> list[DepthScores]:
        return [self._scores[step] for step in sorted(self._scores)]

    def _score_if_due(self, step: int) -> None:
        epoch = self._schedule.scored_epoch(step)
        if epoch is None or step in self._scores or self._stop.reason is not None:
            return
        with suppress(_Stopped):
            self._wait()  # one at a time
            if self.has_ended:
                return
            try:
                self._score(step, epoch)
            except (_Stopped, LeaseLostError, ClusterLostError):
                raise
            except Exception as error:
                self._log_failure(epoch, error)

    def _score(self, step: int, epoch: int) -> None:
        started = time.monotonic()
        task = score_task(self._run, self._layout, self._backbone.prepared.run.depths, step, epoch)
        if self._process is None:
            with reported_to(lambda text: self._check()):
                self._record(step, epoch, score_depths(task), started)
            return
        if self._uses_free_resources:
            on_one_core = task if self._layout.gpus else replace(task, threads=1)
            side_task = self._process.start_in_free_resources(score_depths_of_one_run, on_one_core)
            if side_task is not None:
                self._pending = _Pending(step, epoch, side_task, started)
                return
        side_task = self._process.start_beside_first_stage(
            score_depths_of_one_run, self._with_stage_resources(task)
        )
        self._pending = _Pending(step, epoch, side_task, started)
        self._wait()

    def _with_stage_resources(self, task: ScoreTask) -> ScoreTask:
        """With the threads and the GPUs of the first stage, which waits."""
        return replace(task, threads=self._layout.threads, visible_gpus=self._visible_gpus)

    def _wait(self) -> None:
        """Wait for the score that is being computed, unless its node is lost or it takes too long. Raises _Stopped."""
        if self._pending is None:
            return
        assert self._placement_group is not None
        watch = LostNodeWatch(self._placement_group, wait_s=0.0, action="scoring")
        end = time.monotonic() + SCORE_LIMIT_S
        while self._pending is not None:
            self._check()
            self._collect(POLL_S)
            if (pending := self._pending) is None:
                return
            try:
                watch.check()
                if time.monotonic() > end:
                    raise TimeoutError(f"no scores within {duration(SCORE_LIMIT_S)}")
            except (PlacementError, TimeoutError) as error:
                self._cancel()
                self._log_failure(pending.epoch, error)

    def _collect(self, timeout_s: float = 0.0) -> None:
        """Record the score that is being computed, if it is there."""
        pending = self._pending
        if pending is None or not pending.task.is_done(timeout_s):
            return
        try:
            self._record(pending.step, pending.epoch, pending.task.result(), pending.started)
        except (LeaseLostError, ClusterLostError):
            raise
        except Exception as error:
            self._uses_free_resources = False
            self._log_failure(pending.epoch, error)
        finally:
            self._pending = None

    def _check(self) -> None:
        if self._backbone.lease is not None:
            self._backbone.lease.raise_if_lost()
        if self._stop.reason is not None:
            self._cancel()
            raise _Stopped

    def _log_failure(self, epoch: int, error: Exception) -> None:
        log.warning("epoch %d cannot be scored: %s; the training goes on", epoch, format_error(error))

    def _record(self, step: int, epoch: int, result: ScoreResult, started: float) -> None:
        seconds = time.monotonic() - started  # with the start of a process, for which the training may wait
        scores = DepthScores(step, epoch, result.metric, result.by_depth, result.images, seconds)
        self._scores[step] = scores
        out, tracker = self._run.out, self._backbone.tracker
        is_best = self.best == scores
        line = scores_line(scores, self._run.settings.schedule.epochs)
        log.info(f"{line}{'  new best' if is_best and len(self._scores) > 1 else ''}")
        self._progress.scores = depths_text(scores)
        name = SCORES_WHILE_TRAINING[scores.metric]
        tracker.log_depth_metrics(
            step, {depth: {name: value} for depth, value in scores.by_depth.items()}, self._series
        )
        prefix = f"{self._series}/" if self._series else ""
        tracker.log_metrics(step, {f"{prefix}mean_{name}": scores.mean})
        try:
            write_scores(out, self._ordered)
            if result.picture:
                self._save_picture(epoch, result.picture)
        except StorageError as error:
            log.warning("%s", error)

    def _save_picture(self, epoch: int, png: bytes) -> None:
        digits = len(str(self._run.settings.schedule.epochs))
        path = self._run.out / "pictures" / f"reconstructions_epoch{epoch:0{max(3, digits)}d}.png"
        make_folder(path.parent)
        atomic_write(path, png)
        self._backbone.tracker.log_file(path, f"pictures/{self._series}" if self._series else "pictures")


def _scores_so_far(run: ResolvedRun) -> dict[int, DepthScores]:
    """By step, up to the checkpoint that the run goes on from: later ones are of checkpoints that are gone."""
    latest = open_store(run.out, run.record).latest()
    step = 0 if latest is None else latest.step
    return {score.step: score for score in read_scores(run.out) if score.step <= step}


def scores_line(scores: DepthScores, epochs: int) -> str:
    """`epoch 10/100  kNN top-1 by depth 41.0, 52.3 % of 200 validation images  (12 s)`."""
    split = "validation" if scores.metric == "knn_top1" else "training"
    return (
        f"epoch {scores.epoch:{len(str(epochs))}d}/{epochs}  {depths_text(scores)} of {scores.images} {split} images"
        f"  ({duration(scores.seconds)})"
    )


def depths_text(scores: DepthScores) -> str:
    """`kNN top-1 by depth 41.0, 52.3 %`."""
    info = METRICS[scores.metric]
    values = ", ".join(f"{info.scale * scores.by_depth[depth]:.1f}" for depth in sorted(scores.by_depth))
    return f"{info.name} by depth {values}{' %' if info.percent else ''}"
