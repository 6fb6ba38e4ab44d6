"""The training loop: submits steps to the stages, collects reports, commits checkpoints, rewinds after failures."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.training.callbacks import SAVE_TIMEOUT_S, Callback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint_marks import CheckpointMarks, CompleteCheckpoint
from bim.orchestrator.training.errors import (
    CheckpointDamagedError,
    Interrupted,
    StageFailure,
    TrainingError,
)
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.messages import SavedBlocks, StepReport, StepRequest
from bim.orchestrator.training.meter import Meter
from bim.orchestrator.training.restart_policy import (
    RestartBudget,
    RestartPolicy,
    Verdict,
    disk_sentence,
    final_error,
    is_disk_error,
)
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.stage_group import Stages, component_label, stage_label
from bim.orchestrator.training.storage import Checkpoints
from bim.orchestrator.training.watchdog import LOADER, Watchdog

POLL_S = 1.0
"""How long the loop waits for a report before it looks at stop requests and at the watchdog."""

PATIENT_STOPS = ("SIGUSR2",)
"""Reasons of a stop whose checkpoint is waited for."""

log = logging.getLogger(__name__)


def pretrain(
    schedule: TrainingSchedule,
    stages: Stages,
    store: Checkpoints,
    make_manifest: Callable[[int], Manifest],
    callback: Callback,
    policy: RestartPolicy,
    stop: StopRequest,
    watchdog: Watchdog | None = None,
) -> PretrainResult:
    """Train from the newest valid checkpoint in `store` (from the seed if there is none) to the end of the schedule.

    Args:
        make_manifest: number of steps -> the manifest of that state, without files.
        watchdog: decides when a stage is hung; None: one with the default limits.

    Raises:
        TrainingError: a loss that is not finite, a process lost once too often, a full disk. The last checkpoint is kept.
        TooManyCorruptImagesError: more unreadable images than the schedule allows.
        StorageError: the file system of the checkpoints is full, read-only or gone. The last checkpoint is kept.
        Exception: what a stage's code raised, when a restart did not help.
    """
    store.make_root()
    budget = RestartBudget(policy)
    loop = _Loop(
        schedule, stages, store, make_manifest, callback, stop, budget.commit, watchdog or Watchdog()
    )
    while True:
        try:
            if loop.step is None:
                loop.rewind()
            stopped = loop.run()
            break
        except Interrupted:
            assert stop.reason is not None
            log.warning("stopping without a new checkpoint; last checkpoint: %s", loop.last_checkpoint)
            stopped = stop.reason
            break
        except StageFailure as failure:
            log.debug("%s\n%s", failure, failure.details)
            loop.forget_pending()
            if stop.reason is not None:
                log.warning("%s; stopping; last checkpoint: %s", failure, loop.last_checkpoint)
                stopped = stop.reason
                break
            verdict = budget.judge(failure, loop.completed_steps if failure.step is None else failure.step)
            if verdict is not Verdict.RESTART:
                raise final_error(failure, verdict, budget.used, loop.last_checkpoint) from failure
            delay = f" in {budget.delay_s:.0f} s" if budget.delay_s >= 1 else ""
            attempt = f"restart {budget.used} of {policy.max_restarts}"
            log.warning("%s; rewinding all stages%s (%s)", failure, delay, attempt)
            loop.pause(budget.delay_s)
        except OSError as error:
            if not is_disk_error(error):
                raise
            raise TrainingError(disk_sentence(error, loop.last_checkpoint)) from error
        finally:
            stop.can_save = False
    return PretrainResult(
        loop.completed_steps, budget.total, stopped, loop.bad_images, loop.meter.images_per_s()
    )


@dataclass
class _Loop:
    """The loop's state between two failures, and the unreadable images of the whole run."""

    schedule: TrainingSchedule
    stages: Stages
    store: Checkpoints
    make_manifest: Callable[[int], Manifest]
    callback: Callback
    stop: StopRequest
    on_commit: Callable[[int], None]
    watchdog: Watchdog
    step: int | None = None
    """The next step to submit; None while the stages are not restored."""
    completed_steps: int = 0
    """Steps that every stage completed."""
    committed_step: int | None = None
    """The step of the last checkpoint; None if there is none."""
    ends_early: bool = False
    """Whether the callback has seen enough."""
    bad_images: dict[str, str] = field(default_factory=dict)
    in_flight: deque[tuple[StepRequest, Any]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.meter = Meter(self.schedule)
        self.marks = CheckpointMarks(self.schedule, self.stop.saves_requested)
        self.stop_deadline: float | None = None

    @property
    def last_checkpoint(self) -> str:
        """For messages: "step 170", "none"."""
        if self.committed_step is None and self.step is None:  # nothing was restored yet
            manifest = self.store.latest()
            self.committed_step = None if manifest is None else manifest.step
        return "none" if self.committed_step is None else f"step {self.committed_step}"

    def rewind(self) -> None:
        """Restore all stages from the newest valid checkpoint, after replacing those whose process is gone."""
        self.store.clear_uncommitted()
        manifest = self._restore()
        step = 0 if manifest is None else manifest.step
        if step == self.schedule.total_steps:
            log.info("checkpoint is already at the last step (%d); nothing to train", step)
        elif step:
            log.info("continuing after step %d of %d", step, self.schedule.total_steps)
        if manifest is not None:
            self.bad_images = manifest.facts.get("bad_images", {}) | self.bad_images
        self.callback.on_rewind(step)
        self.step = self.completed_steps = step
        self.meter = Meter(self.schedule)
        self.marks.rewind()
        self.watchdog.reset()
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
            if manifest is None and self.committed_step is not None:
                raise TrainingError(
                    f"there is no checkpoint left to go on from: that of step {self.committed_step} is gone or damaged"
                )
            step = 0 if manifest is None else manifest.step
            self.committed_step = None if manifest is None else step
            self.stages.start(self._stop_requested)
            checkpoint = None if manifest is None else self.store.directory(step)
            try:
                self.stages.restore(checkpoint, step, self._stop_requested)
            except (StageFailure, CheckpointDamagedError) as error:
                cause = error.cause if isinstance(error, StageFailure) else error
                if not isinstance(cause, CheckpointDamagedError):
                    raise
                damaged = cause
                self.store.reject(cause)
            else:
                return manifest

    def run(self) -> str | None:
        """Submit and collect steps until the schedule ends, the callback ends it early or a stop is requested.

        Returns the reason of the stop.
        """
        assert self.step is not None
        total = self.schedule.total_steps
        while self.step < total and self.stop.reason is None and not self.ends_early:
            if self.schedule.starts_phase(self.step):
                self._collect(0)  # steps in flight have another image size
                self.watchdog.reset()
            self._submit(self.step)
            self.step += 1
        self._collect(0)
        self._flush()
        if self.stop.reason is not None:
            if self.committed_step != self.step:
                self.marks.add(self.step, str(self.store.directory(self.step)), self.bad_images)
                self.stages.save(self.store.directory(self.step), self._gives_up)
                self._flush()
            log.info("checkpoint saved after step %d of %d", self.step, total)
        return self.stop.reason if self.step < total else None

    def forget_pending(self) -> None:
        """Wait until nothing that was submitted is running, and forget it."""
        self.stages.cancel_pending([pending for _, pending in self.in_flight], self._gives_up)
        self.in_flight.clear()
        self.step = None

    def pause(self, seconds: float) -> None:
        """Wait before a restart, until a stop is requested."""
        end = time.monotonic() + seconds
        while self.stop.reason is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))

    def _submit(self, step: int) -> None:
        micro_steps = self.schedule.phase(step).grad_accum_steps
        for micro_step in range(micro_steps):
            is_saved = micro_step == micro_steps - 1 and self.marks.is_due(step, self.stop.saves_requested)
            checkpoint = str(self.store.directory(step + 1)) if is_saved else None
            request = StepRequest(step, self.schedule.lr(step), micro_step, micro_steps, checkpoint)
            self.in_flight.append((request, self.stages.submit(request)))
            self._collect(self.schedule.window)

    def _collect(self, max_in_flight: int) -> None:
        while len(self.in_flight) > max_in_flight:
            request, pending = self.in_flight[0]
            report = self._wait(request, pending)
            self.in_flight.popleft()
            self._record(report)
            if request.is_last_micro_step:
                self.completed_steps = request.step + 1
                if request.checkpoint is not None:
                    self.marks.add(self.completed_steps, request.checkpoint, self.bad_images)
                self._commit_complete([stage.saved for stage in report.stages])
                self._emit(request)

    def _wait(self, request: StepRequest, pending: Any) -> StepReport:
        """Wait for a micro-batch. Raises StageFailure also when a component is hung."""
        while (report := self.stages.wait(pending, POLL_S)) is None:
            if self._gives_up():
                raise Interrupted
            component = self.stages.awaited(pending)
            saves = request.checkpoint is not None
            hung_for = self.watchdog.hung_for((request.step, request.micro_step), component, saves)
            if hung_for is not None:
                self.stages.kill(component)
                raise self._hung(component, request.step, hung_for)
        return report

    def _hung(self, component: int, step: int, seconds: float) -> StageFailure:
        usual_s = self.watchdog.usual_s(component)
        usual = f"; it usually needs {usual_s:.2g} s" if usual_s is not None else ""
        cause = TimeoutError(f"no answer for {seconds:.0f} s{usual}")
        label = component_label(component, self.stages.stage_blocks)
        return StageFailure(label, f"(hung) at step {step}", cause, process_lost=True, step=step)

    def _flush(self) -> None:
        """Commit every checkpoint that is still being written."""
        self._commit_complete(self.stages.flush(self._gives_up))

    def _commit_complete(self, saved: Sequence[tuple[SavedBlocks, ...]]) -> None:
        for checkpoint in self.marks.complete(saved):
            self._commit(checkpoint)

    def _commit(self, checkpoint: CompleteCheckpoint) -> None:
        manifest = self.make_manifest(checkpoint.step)
        facts = manifest.facts | {"bad_images": checkpoint.bad_images}
        self.store.commit(replace(manifest, facts=facts, files=checkpoint.files))
        self.committed_step = checkpoint.step
        self.on_commit(checkpoint.step)
        if checkpoint.requested:
            log.info("checkpoint saved after step %d of %d", checkpoint.step, self.schedule.total_steps)
        start = time.perf_counter()
        self.ends_early |= bool(self.callback.on_checkpoint(checkpoint.step))
        self.meter.leave_out(time.perf_counter() - start)

    def _record(self, report: StepReport) -> None:
        self.meter.add(report)
        self.watchdog.record(LOADER, report.load_s)
        for number, stage in enumerate(report.stages):
            self.watchdog.record(number, stage.busy_s + stage.mask_wait_s)
        for name, reason in report.bad_images:
            if name not in self.bad_images:
                self.bad_images[name] = reason
                log.warning("skipped an unreadable image: %s (%s)", name, reason)
        if len(self.bad_images) > self.schedule.max_bad_images:
            last = next(reversed(self.bad_images))
            raise TooManyCorruptImagesError(
                f"{len(self.bad_images)} images could not be read, the last being {last} ({self.bad_images[last]}), and "
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
            self.callback.on_epoch(replace(report, slow_stage=self._slow_stage()))

    def _slow_stage(self) -> str | None:
        slow = self.watchdog.slow_stage(len(self.stages.stage_blocks))
        return slow and f"{stage_label(slow[0], self.stages.stage_blocks[slow[0]])} {slow[1]:.1f} x"

    def _stop_requested(self) -> bool:
        return self.stop.reason is not None

    def _gives_up(self) -> bool:
        """Whether a stop was requested and its time for a checkpoint is over."""
        if self.stop.reason is None or self.stop.reason in PATIENT_STOPS:
            return False
        if self.stop_deadline is None:
            self.stop_deadline = time.monotonic() + SAVE_TIMEOUT_S
        return time.monotonic() > self.stop_deadline
