"""The phases of a run: from which epoch on images have which size and batches how many images. Pure arithmetic.

One frozen record that the loader, the loop and the learning rate read, so that they cannot disagree about what step 1,234
is; resuming inside any phase is a look-up. Serves FastMIM's growing resolution; a run without one has a single phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class PhaseSpec:
    """What a phase asks for.

    Args:
        first_epoch: counted from 0; a phase lasts until the next one begins, the last one for ever.
        size: (height, width) in pixels of its training crops.
        batch_size: images per micro-batch.
        grad_accum_steps: micro-batches per optimizer step.
    """

    first_epoch: int
    size: tuple[int, int]
    batch_size: int
    grad_accum_steps: int = 1

    @property
    def images_per_step(self) -> int:
        """The effective batch."""
        return self.batch_size * self.grad_accum_steps


@dataclass(frozen=True)
class Phase(PhaseSpec):
    """A phase on a data set: `first_step` is its first optimizer step, `steps_per_epoch` how many fit into an epoch."""

    first_step: int = 0
    steps_per_epoch: int = 1

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of optimizer step `step` of this phase."""
        epoch, within = divmod(step - self.first_step, self.steps_per_epoch)
        return self.first_epoch + epoch, within


def phases_on(specs: Sequence[PhaseSpec], images: int) -> tuple[Phase, ...]:
    """The phases on `images` training images. Images that fill no whole step are left out of an epoch.

    Raises ValueError if the first phase does not begin with epoch 0, if a later one does not begin after the one before,
    or if a phase's step needs more images than there are.
    """
    if not specs or specs[0].first_epoch != 0:
        raise ValueError("the first phase of a run begins with epoch 0")
    for before, after in pairwise(specs):
        if after.first_epoch <= before.first_epoch:
            raise ValueError(
                f"a phase begins with epoch {after.first_epoch}, and the one before it with epoch {before.first_epoch}"
            )
    found: list[Phase] = []
    for spec in specs:
        steps = images // spec.images_per_step
        if steps == 0:
            raise ValueError(f"{images} images are fewer than the {spec.images_per_step} of one step")
        first = found[-1].first_step if found else 0
        if found:
            first += (spec.first_epoch - found[-1].first_epoch) * found[-1].steps_per_epoch
        found.append(Phase(spec.first_epoch, spec.size, spec.batch_size, spec.grad_accum_steps, first, steps))
    return tuple(found)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase to which optimizer step `step` belongs."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


def steps_until(phases: Sequence[Phase], epoch: int) -> int:
    """How many optimizer steps the first `epoch` epochs have."""
    phase = next(phase for phase in reversed(phases) if phase.first_epoch <= epoch)
    return phase.first_step + (epoch - phase.first_epoch) * phase.steps_per_epoch


def constant(
    steps_per_epoch: int, batch_size: int, grad_accum_steps: int = 1, size: tuple[int, int] = (0, 0)
) -> tuple[Phase, ...]:
    """A run that does not change: one phase with so many optimizer steps per epoch."""
    return (Phase(0, size, batch_size, grad_accum_steps, 0, steps_per_epoch),)
