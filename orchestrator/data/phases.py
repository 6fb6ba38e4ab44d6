"""Resolution phases of a run: from which epoch on images have which size and batches how many images.

The loader, the loop and the learning rate read the same frozen records, so that they agree about every step, and
resuming inside any phase is a lookup. FastMIM's growing resolution has several phases, other runs have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bim.orchestrator.data.errors import DataError


@dataclass(frozen=True)
class PhaseSpec:
    """A phase as the settings ask for it.

    Args:
        first_epoch: counted from 0; a phase lasts until the next one begins, the last one to the end of the run.
        size: (height, width) in pixels of its training crops.
        batch_size: images per micro-batch.
        grad_accum_steps: micro-batches per optimizer step.
    """

    first_epoch: int
    size: tuple[int, int]
    batch_size: int
    grad_accum_steps: int = 1

    def __post_init__(self) -> None:
        for key, count in (("batch_size", self.batch_size), ("accumulate", self.grad_accum_steps)):
            if count < 1:
                raise ValueError(f"data.{key} is {count}; give at least 1")

    @property
    def images_per_step(self) -> int:
        """The effective batch size."""
        return self.batch_size * self.grad_accum_steps


@dataclass(frozen=True)
class Phase(PhaseSpec):
    """A phase on a data set: `first_step` is its first optimizer step, `steps_per_epoch` how many fit into an epoch."""

    first_step: int = 0
    steps_per_epoch: int = 1

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of optimizer step `step` of this phase."""
        epoch, step_in_epoch = divmod(step - self.first_step, self.steps_per_epoch)
        return self.first_epoch + epoch, step_in_epoch


def phases_on(specs: Sequence[PhaseSpec], images: int, source: str = "the data") -> tuple[Phase, ...]:
    """The phases on `images` training images of `source`. Images that fill no whole step are left out of an epoch.

    Raises ValueError if the first phase does not begin with epoch 0 or if a later one does not begin after its
    predecessor, DataError if a step needs more images than there are.
    """
    if not specs or specs[0].first_epoch != 0:
        raise ValueError("the first phase of a run begins with epoch 0")
    for before, after in pairwise(specs):
        if after.first_epoch <= before.first_epoch:
            raise ValueError(
                f"a phase begins with epoch {after.first_epoch}, and the one before it with epoch {before.first_epoch}"
            )
    phases: list[Phase] = []
    for spec in specs:
        steps = images // spec.images_per_step
        if steps == 0:
            times = f" x data.accumulate={spec.grad_accum_steps}" if spec.grad_accum_steps > 1 else ""
            raise DataError(
                f"{source} has {images} images to train on, fewer than one step's data.batch_size={spec.batch_size}"
                f"{times}; {steps_remedy(images, spec)}"
            )
        first_step = steps_until(phases, spec.first_epoch) if phases else 0
        phases.append(Phase(**vars(spec), first_step=first_step, steps_per_epoch=steps))
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase to which optimizer step `step` belongs."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


MIN_STEPS = 20
"""Steps that an epoch should have: as many as `steps.min_per_epoch` of config/auto.yaml, which `data` does not import."""


def steps_remedy(images: int, spec: PhaseSpec) -> str:
    """Sizes with which an epoch has `MIN_STEPS` steps, or as many as there are images; accumulation falls first."""
    max_images = max(1, images // MIN_STEPS)
    batch = spec.batch_size if spec.batch_size <= max_images else 2 ** (max_images.bit_length() - 1)
    accumulate = max(1, min(spec.grad_accum_steps, max_images // batch))
    sizes = f"data.batch_size {batch}"
    if spec.grad_accum_steps > 1:
        sizes = f"data.accumulate {accumulate} and {sizes}"
    return f"with {sizes} an epoch has {images // (batch * accumulate)} steps"


def steps_until(phases: Sequence[Phase], epoch: int) -> int:
    """Number of optimizer steps in the first `epoch` epochs."""
    phase = next(phase for phase in reversed(phases) if phase.first_epoch <= epoch)
    return phase.first_step + (epoch - phase.first_epoch) * phase.steps_per_epoch


def constant(
    steps_per_epoch: int, batch_size: int, grad_accum_steps: int = 1, size: tuple[int, int] = (0, 0)
) -> tuple[Phase, ...]:
    """The single phase of a run whose size and batch do not change."""
    return (Phase(0, size, batch_size, grad_accum_steps, 0, steps_per_epoch),)
