"""What the driver sends to a stage and what a stage returns: frozen records of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from bim.orchestrator.training.checkpoint import FileRecord


@dataclass(frozen=True)
class StepRequest:
    """What the driver tells every stage about one micro-batch.

    Args:
        step: optimizer step, counted from 0.
        micro: micro-batch of that step, of `grad_accum_steps`.
        lr: learning rate of the step.
        checkpoint: folder to save into right after this step's update; None: no mark.
    """

    step: int
    lr: float
    micro: int = 0
    grad_accum_steps: int = 1
    checkpoint: str | None = None

    @property
    def is_last_micro_step(self) -> bool:
        return self.micro == self.grad_accum_steps - 1


@dataclass(frozen=True)
class StageReport:
    """What a stage says of one micro-batch.

    `blocks` maps a block's number to its metrics; `busy_s` and `idle_s` are seconds of work and of waiting, for what
    comes in and for the plan of the masks; `mask_wait_s` are those for the plan.
    """

    blocks: dict[int, dict[str, float]]
    files: tuple[FileRecord, ...]
    busy_s: float
    idle_s: float
    mask_wait_s: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """What the whole group says of one micro-batch, stages in their order."""

    order: StepRequest
    stages: tuple[StageReport, ...]
    bad_images: tuple[tuple[str, str], ...]
    load_s: float
    data_wait_s: float
    """Seconds that nothing was done for want of data."""
