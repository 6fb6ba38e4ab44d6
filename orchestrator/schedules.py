"""Learning rate as a function of the step, so that resuming is arithmetic.

Serves the training loop, which tells every stage the rate of every step; no scheduler object holds state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to 0 (MAE `PRETRAIN.md`), evaluated per optimizer step.

    Args:
        peak: learning rate at the end of the warm-up.
        warmup_steps: optimizer steps of the warm-up.
        total_steps: optimizer steps of the whole run.
    """

    peak: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
