"""Requests to the stages and their reports: frozen records of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from bim.orchestrator.training.manifest import FileRecord


@dataclass(frozen=True)
class StepRequest:
    """The driver's request to every stage: train on one micro-batch.

    Args:
        step: optimizer step, counted from 0.
        lr: learning rate of the step.
        micro_step: micro-batch of that step, counted from 0, of `grad_accum_steps`.
        checkpoint: folder to save into after this step's update; None: do not save. It is written in the background.
    """

    step: int
    lr: float
    micro_step: int = 0
    grad_accum_steps: int = 1
    checkpoint: str | None = None

    @property
    def is_last_micro_step(self) -> bool:
        return self.micro_step == self.grad_accum_steps - 1

    @property
    def following(self) -> tuple[int, int]:
        """(step, micro_step) of the next request of the same phase."""
        return (self.step + 1, 0) if self.is_last_micro_step else (self.step, self.micro_step + 1)


@dataclass(frozen=True)
class SavedBlocks:
    """The part of a checkpoint that a stage has written, complete on the disk.

    Args:
        checkpoint: the folder, as it was requested.
    """

    checkpoint: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class StageReport:
    """A stage's report of one micro-batch.

    Args:
        blocks: block -> its metrics.
        saved: what was written since the last report, of this or an earlier micro-batch's checkpoint.
        busy_s: seconds of work.
        idle_s: seconds of waiting for input and for mask plans.
        mask_wait_s: seconds of waiting for mask plans alone.
    """

    blocks: dict[int, dict[str, float]]
    saved: tuple[SavedBlocks, ...]
    busy_s: float
    idle_s: float
    mask_wait_s: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """The reports of all stages on one micro-batch.

    Args:
        stages: first stage first.
        bad_images: (name, reason) of images that could not be read.
        load_s: seconds that the loader needed.
        data_wait_s: seconds in which no stage worked because the data was not there.
    """

    request: StepRequest
    stages: tuple[StageReport, ...]
    bad_images: tuple[tuple[str, str], ...]
    load_s: float
    data_wait_s: float
