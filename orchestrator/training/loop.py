"""The training loop: submits steps to the stages, collects reports, commits checkpoints, rewinds after failures."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.training.callbacks import Callback, PretrainResult, StopRequest
from bim.orchestrator.training.errors import CheckpointDamagedError, StageFailure, TrainingError
from bim.orchestrator.training.manifest import FileRecord, Manifest
from bim.orchestrator.training.messages import StepReport, StepRequest
from bim.orchestrator.training.meter import Meter
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.stage_group import Stages
from bim.orchestrator.training.storage import Checkpoints

log = logging.getLogger(__name__)


def pretrain(
    schedule: TrainingSchedule,
    stages: Stages,
    store: Checkpoints,
    make_manifest: Callable[[int], Manifest],
    callback: Callback,
    policy: RestartPolicy,
    stop: StopRequest,
) -> PretrainResult:
    """Train from the newest valid checkpoint in `store` (from the seed if there is none) to the end of the schedule.

    Args:
        make_manifest: number of steps -> the manifest of that state, without files.

    Raises:
        TrainingError: a loss that is not finite, or a process lost once too often. The last checkpoint is kept.
        TooManyCorruptImagesError: more unreadable images than the schedule allows.
        StorageError: the file system of the checkpoints is full, read-only or gone. The last checkpoint is kept.
        Exception: what a stage's code raised, when the restarts are used up.
    """
    store.make_root()
    loop = _Loop(schedule, stages, store, make_manifest, callback, stop)
    restarts = 0
    while True:
        try:
            if loop.step is None:
                loop.rewind()
            stopped = loop.run()
            break
        except StageFailure as failure:
            loop.cancel_pending()
            if stop.reason is not None:
                last = "none" if loop.committed_step is None else f"step {loop.committed_step}"
                log.warning("%s; stopping; last checkpoint: %s", failure, last)
                stopped = stop.reason
                break
            if not policy.restarts(failure, restarts):
                if failure.process_lost:
                    raise TrainingError(
                        f"{failure}, after {restarts} restart{'s' * (restarts != 1)} (failures.max_restarts); the last "
                        "checkpoint is kept"
                    ) from failure
                raise failure.cause from failure
            restarts += 1
            log.warning("%s; rewinding all stages (restart %d of %d)", failure, restarts, policy.max_restarts)
        finally:
            stop.can_save = False
    return PretrainResult(loop.completed_steps, restarts, stopped, loop.bad_images, loop.meter.images_per_s())


@dataclass
class _Loop:
    """The loop's state between two failures, and the unreadable images of the whole run."""

    schedule: TrainingSchedule
    stages: Stages
    store: Checkpoints
    make_manifest: Callable[[int], Manifest]
    callback: Callback
    stop: StopRequest
    step: int | None = None
    """The next step to submit; None while the stages are not restored."""
    completed_steps: int = 0
    """Steps that every stage completed."""
    committed_step: int | None = None
    """The step of the last checkpoint; None if there is none."""
    bad_images: dict[str, str] = field(default_factory=dict)
    in_flight: deque[tuple[StepRequest, Any]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.meter = Meter(self.schedule)
        self.saves_done = self.stop.saves_requested
        self.requested_step: int | None = None

    def rewind(self) -> None:
        """Restore all stages from the newest valid checkpoint, after replacing those whose process is gone."""
        self.stages.start()
        manifest = self._restore()
        step = 0 if manifest is None else manifest.step
        if step == self.schedule.total_steps:
            log.info("checkpoint is already at the last step (%d); nothing to train", step)
        elif step:
            log.info("continuing after step %d of %d", step, self.schedule.total_steps)
        if manifest is not None:
            self.bad_images = manifest.facts.get("bad_images", {}) | self.bad_images
        self.callback.on_rewind(step)
        self.committed_step = None if manifest is None else step
        self.step = self.completed_steps = step
        self.meter = Meter(self.schedule)
        self.stop.can_save = True

    def _restore(self) -> Manifest | None:
        """Restore all stages from the newest checkpoint that they can read, which is returned; None: from the seed.

        Raises:
            TrainingError: there were checkpoints, and all turned out to be damaged.
        """
        damaged: CheckpointDamagedError | None = None
        while True:
            manifest = self.store.latest(warn=True)
            if manifest is None and damaged is not None:
                raise TrainingError(f"there is no checkpoint left to go on from: {damaged}") from damaged
            step = 0 if manifest is None else manifest.step
            try:
                self.stages.restore(None if manifest is None else self.store.directory(step), step)
            except (StageFailure, CheckpointDamagedError) as error:
                cause = error.cause if isinstance(error, StageFailure) else error
                if not isinstance(cause, CheckpointDamagedError):
                    raise
                damaged = cause
                self.store.reject(cause)
            else:
                return manifest

    def run(self) -> str | None:
        """Submit and collect steps until the schedule ends or a stop is requested. Returns the reason of the stop."""
        assert self.step is not None
        total = self.schedule.total_steps
        while self.step < total and self.stop.reason is None:
            if self.schedule.starts_phase(self.step):
                self._collect(0)  # steps in flight have another image size
            self._submit(self.step)
            self.step += 1
        self._collect(0)
        if self.stop.reason is not None:
            if self.committed_step != self.step:
                self._commit(self.step, self.stages.save(self.store.directory(self.step)))
            log.info("checkpoint saved after step %d of %d", self.step, total)
        return self.stop.reason if self.step < total else None

    def cancel_pending(self) -> None:
        """Wait until nothing that was submitted is running, and forget it."""
        self.stages.cancel_pending([pending for _, pending in self.in_flight])
        self.in_flight.clear()
        self.step = None

    def _submit(self, step: int) -> None:
        micro_steps = self.schedule.phase(step).grad_accum_steps
        for micro_step in range(micro_steps):
            is_saved = micro_step == micro_steps - 1 and self._saves(step)
            checkpoint = str(self.store.directory(step + 1)) if is_saved else None
            request = StepRequest(step, self.schedule.lr(step), micro_step, micro_steps, checkpoint)
            self.in_flight.append((request, self.stages.submit(request)))
            self._collect(self.schedule.window)

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step, by the schedule or because one was asked for."""
        requested, self.saves_done = self.stop.saves_requested > self.saves_done, self.stop.saves_requested
        if requested:
            self.requested_step = step + 1
        return requested or self.schedule.is_checkpoint_step(step)

    def _collect(self, max_in_flight: int) -> None:
        while len(self.in_flight) > max_in_flight:
            request, pending = self.in_flight[0]
            report = self.stages.wait(pending)
            self.in_flight.popleft()
            self._record(report)
            if request.is_last_micro_step:
                self.completed_steps = request.step + 1
                if request.checkpoint is not None:
                    files = [record for stage in report.stages for record in stage.files]
                    self._commit(self.completed_steps, files)
                self._emit(request)

    def _commit(self, step: int, files: Iterable[FileRecord]) -> None:
        manifest = self.make_manifest(step)
        facts = manifest.facts | {"bad_images": self.bad_images}
        # Sorted by name, the manifest is equal for every placement of the blocks.
        by_name = tuple(sorted(files, key=lambda record: record.name))
        self.store.commit(replace(manifest, facts=facts, files=by_name))
        self.committed_step = step
        if step == self.requested_step:
            log.info("checkpoint saved after step %d of %d", step, self.schedule.total_steps)
        self.callback.on_checkpoint(step)

    def _record(self, report: StepReport) -> None:
        self.meter.add(report)
        for name, reason in report.bad_images:
            if name not in self.bad_images:
                self.bad_images[name] = reason
                log.warning("skipped an unreadable image: %s (%s)", name, reason)
        if len(self.bad_images) > self.schedule.max_bad_images:
            raise TooManyCorruptImagesError(
                f"{len(self.bad_images)} images could not be read, the last being {next(reversed(self.bad_images))}, and "
                f"data.max_bad_fraction allows {self.schedule.max_bad_images}; repair or remove them, or raise it"
            )

    def _emit(self, request: StepRequest) -> None:
        metrics = self.meter.step_metrics(request.step)
        if metrics is not None:
            metrics["data/bad_images"] = float(len(self.bad_images))
            metrics |= {"lr": request.lr, "images_per_s": self.meter.images_per_s()}
            self.callback.on_step(request.step + 1, metrics)
        report = self.meter.epoch_report(request.step)
        if report is not None:
            self.callback.on_epoch(report)
