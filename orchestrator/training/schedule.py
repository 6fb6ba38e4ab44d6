"""Length and pace of a training run as a plain record: epochs, phases, learning rate, checkpoint steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bim.orchestrator.data.phases import Phase, phase_at, steps_until


@dataclass(frozen=True)
class TrainingSchedule:
    """Length and pace of a training run.

    Args:
        phases: image and batch sizes by epoch; the pipeline is drained at the end of each phase.
        lr: learning rate of a step.
        window: micro-batches in flight. Twice the number of stages keeps every stage busy. The window is also the
            back-pressure: it bounds how far stage 0 runs ahead of the last stage.
        checkpoint_epochs: epochs, or a fraction of one, between checkpoints; the last step of a phase always has one.
        checkpoint_s: seconds after which there is a checkpoint beside those; None: no such ones.
        max_bad_images: distinct unreadable images above which the run stops.
        score_epochs: epochs between the scores of a run, each of which needs a checkpoint; None: it is not scored.
    """

    epochs: int
    phases: tuple[Phase, ...]
    lr: Callable[[int], float]
    window: int
    checkpoint_epochs: float
    max_bad_images: int
    checkpoint_s: float | None = None
    score_epochs: int | None = None

    @property
    def total_steps(self) -> int:
        return steps_until(self.phases, self.epochs)

    def phase(self, step: int) -> Phase:
        """The phase of an optimizer step."""
        return phase_at(self.phases, step)

    def starts_phase(self, step: int) -> bool:
        """Whether a phase other than the first starts with this step."""
        return step > 0 and self.phase(step).first_step == step

    def is_checkpoint_step(self, step: int) -> bool:
        """Whether the state after optimizer step `step` is saved."""
        phase, done = self.phase(step), step + 1
        every = max(1, round(self.checkpoint_epochs * phase.steps_per_epoch))
        return (
            (done - phase.first_step) % every == 0
            or done == self.total_steps
            or (done < self.total_steps and self.starts_phase(done))
            or self.scored_epoch(done) is not None
        )

    def scored_epoch(self, done: int) -> int | None:
        """The epoch, counted from 1, that ends after `done` steps, if the run is scored there; never at its end."""
        if self.score_epochs is None or not 0 < done < self.total_steps:
            return None
        phase = self.phase(done - 1)
        epoch, index = phase.epoch_of(done - 1)
        is_end = index + 1 == phase.steps_per_epoch
        return epoch + 1 if is_end and (epoch + 1) % self.score_epochs == 0 else None

    def remaining_images(self, done: int) -> float:
        """Images left after `done` steps, each weighted by its pixels relative to those of the current phase."""
        current = self.phase(max(0, done - 1))
        ends = [*(phase.first_step for phase in self.phases[1:]), self.total_steps]
        remaining = 0.0
        for phase, end in zip(self.phases, ends, strict=True):
            steps = max(0, min(end, self.total_steps) - max(done, phase.first_step))
            pixels = phase.size[0] * phase.size[1] / max(1, current.size[0] * current.size[1])
            remaining += steps * phase.images_per_step * (pixels if phase.size != current.size else 1.0)
        return remaining
