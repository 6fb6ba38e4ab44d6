"""Learning rate as a function of the step, without state, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bim.orchestrator.data.phases import Phase, PhaseSpec, phase_at

REFERENCE_BATCH = 256  # batch size of a base learning rate (MAE, PRETRAIN.md)


def peak_rate(blr: float, phase: PhaseSpec) -> float:
    """blr x effective batch size / 256, the learning rate at the end of the warm-up."""
    return blr * phase.images_per_step / REFERENCE_BATCH


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to 0 (MAE, PRETRAIN.md), evaluated per optimizer step.

    One curve over the epochs of the whole run, scaled by the peak rate of the step's phase (FastMIM, arXiv 2212.06593).

    Args:
        blr: base learning rate, for 256 images.
        warmup_epochs: may be a fraction.
        epochs: of the whole run.
        phases: image and batch sizes by epoch.
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
        done = epoch * phase.steps_per_epoch + within
        warmup = round(self.warmup_epochs * phase.steps_per_epoch)
        if done < warmup:
            return peak * (done + 1) / warmup
        progress = (done - warmup) / max(1, self.epochs * phase.steps_per_epoch - warmup)
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
