"""Learning rate as a function of the step, so that resuming is arithmetic.

Serves the training loop, which tells every stage the rate of every step; no scheduler object holds state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bim.orchestrator.data.phases import Phase, PhaseSpec, phase_at

REFERENCE_BATCH = 256  # images to which a base learning rate refers (MAE, PRETRAIN.md)


def peak_rate(blr: float, phase: PhaseSpec) -> float:
    """blr x effective batch / 256, the learning rate to which the warm-up of such a phase leads."""
    return blr * phase.images_per_step / REFERENCE_BATCH


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to 0 (MAE `PRETRAIN.md`), evaluated per optimizer step.

    One curve over the epochs of the whole run, times blr x effective batch / 256 of the step's own phase (FastMIM's
    trainer, papers.md 3.4).

    Args:
        blr: base learning rate, of 256 images.
        warmup_epochs: epochs of the warm-up; may be a fraction.
        epochs: of the whole run.
        phases: where batches change their size.
    """

    blr: float
    warmup_epochs: float
    epochs: int
    phases: tuple[Phase, ...]

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        phase = phase_at(self.phases, step)
        peak = peak_rate(self.blr, phase)
        epoch, within = phase.epoch_of(step)
        # In steps of this phase, so that whole numbers stay exact.
        passed = epoch * phase.steps_per_epoch + within
        warmup = round(self.warmup_epochs * phase.steps_per_epoch)
        if passed < warmup:
            return peak * (passed + 1) / warmup
        progress = (passed - warmup) / max(1, self.epochs * phase.steps_per_epoch - warmup)
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
