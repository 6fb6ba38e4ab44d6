"""Batches of uint8 images: augmented ones for training, addressed by step, and whole ones for evaluation, in order.
The content of a training batch is a function of (seed, step, micro) alone: not of workers, of what was asked before, or
of where a run was resumed. For stage 0 of the pipeline and for evaluation; normalising is the device's work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bim.models.seeding import generator
from bim.orchestrator.data.crops import DRAWS, RandomCrop, centre_view
from bim.orchestrator.data.errors import DataError, ImageDecodeError, TooManyCorruptImagesError
from bim.orchestrator.data.phases import Phase, PhaseSpec, phase_at, phases_on
from bim.orchestrator.data.prefetch import Prefetcher
from bim.orchestrator.data.sampler import epoch_order
from bim.orchestrator.data.source import Source

_REPLACEMENTS = 32  # bad images in a row that are replaced; then the data, not the image, is bad


@dataclass(frozen=True)
class Batch:
    """images: (B, 3, h, w) uint8, the caller's own. bad: (name, reason) of every unreadable image met on the way, also
    of ones met before. load_s: seconds the caller waited for this batch."""

    images: np.ndarray
    bad: tuple[tuple[str, str], ...]
    load_s: float


class TrainBatches:
    """Augmented batches of the images `indices` of `source`, any step at any time, the next ones ahead of time.

    One optimizer step takes `accumulate` batches of `batch_size` images of `size`; `later` says from which epoch on this is
    otherwise. An epoch visits the images in an order of its own; images that fill no whole step are left out of that
    epoch. workers: processes that read ahead; 0 reads in this process when asked. Close it when done.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        batch_size: int,
        accumulate: int,
        size: tuple[int, int],
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: bool,
        seed: int,
        workers: int,
        later: tuple[PhaseSpec, ...] = (),
    ) -> None:
        """Raises DataError if `indices` hold less than one step, ValueError for a wrong crop or count."""
        specs = (PhaseSpec(0, size, batch_size, accumulate), *later)
        counts = [("workers", workers, 0)]
        for spec in specs:
            counts += [("batch_size", spec.batch_size, 1), ("accumulate", spec.grad_accum_steps, 1)]
        for key, value, least in counts:
            if value < least:
                raise ValueError(f"data.{key} is {value}; give at least {least}")
        for spec in specs:
            if len(indices) < spec.images_per_step:
                times = f" x data.accumulate={spec.grad_accum_steps}" if spec.grad_accum_steps > 1 else ""
                raise DataError(
                    f"{source.name} has {len(indices)} images to train on, fewer than one step's "
                    f"data.batch_size={spec.batch_size}{times}; lower data.batch_size to "
                    f"{max(1, len(indices) // spec.grad_accum_steps)} or less"
                )
        self.phases = phases_on(specs, len(indices))
        self.steps_per_epoch = self.phases[0].steps_per_epoch
        """Optimizer steps per epoch of the first phase."""
        self._readers = {
            phase: TrainReader(
                source, indices, phase, RandomCrop(phase.size, crop_scale, crop_ratio, flip), seed
            )
            for phase in self.phases
        }
        self._workers = workers
        self._open: tuple[Phase, Prefetcher] | None = None
        if workers:
            self._ahead(self.phases[0])

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Batch `micro` of optimizer step `step` (from 0, over all epochs).

        Asked in order it is mostly there already. Raises TooManyCorruptImagesError if hardly anything can be read,
        RuntimeError if a worker process died.
        """
        if step < 0 or not 0 <= micro < phase_at(self.phases, step).grad_accum_steps:
            raise ValueError(f"there is no batch (step {step}, micro {micro}) with {self.phases}")
        began = time.perf_counter()
        phase = phase_at(self.phases, step)
        number = (step - phase.first_step) * phase.grad_accum_steps + micro
        if self._workers:
            filled = self._ahead(phase).get(number)
            return Batch(filled.items, filled.bad, time.perf_counter() - began)
        reader = self._readers[phase]
        images = np.empty(reader.batch_shape, dtype=np.uint8)
        bad = reader.fill(images, number, 0)
        return Batch(images, tuple(bad), time.perf_counter() - began)

    def _ahead(self, phase: Phase) -> Prefetcher:
        """The workers that read batches of this phase; those of another one are ended."""
        if self._open is None or self._open[0] != phase:
            self.close()
            self._open = (phase, Prefetcher(self._readers[phase], self._workers))
        return self._open[1]

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process numbers of the workers, () without any."""
        return self._open[1].pids if self._open is not None else ()

    def close(self) -> None:
        """End the workers. Harmless if done twice."""
        if self._open is not None:
            self._open[1].close()


class TrainReader:
    """What a data worker runs: any images of any training batch of one phase, by number, counted from the phase's start."""

    def __init__(
        self, source: Source, indices: np.ndarray, phase: Phase, crop: RandomCrop, seed: int
    ) -> None:
        self.source = source
        self.indices = np.sort(indices)  # the order of an epoch shall not depend on how the split was listed
        self.batch_size = phase.batch_size
        self.first_epoch = phase.first_epoch
        self.batches_per_epoch = phase.steps_per_epoch * phase.grad_accum_steps
        self.crop = crop
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return (self.batch_size, 3, *self.crop.size)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        """Images start..start+len(out)-1 of batch `number` -> out (n, 3, h, w); returns (name, reason) of bad ones."""
        passed, within = divmod(number, self.batches_per_epoch)
        epoch = self.first_epoch + passed
        order = self._order(epoch)
        bad: list[tuple[str, str]] = []
        for offset, target in enumerate(torch.from_numpy(out)):
            position = within * self.batch_size + start + offset
            draws = torch.rand(DRAWS, generator=generator(self.seed, "augment", epoch, position)).tolist()
            for index in self._candidates(order, epoch, position):
                try:
                    target.copy_(self.crop(self.source.load(index), draws))
                    break
                except ImageDecodeError as image:
                    bad.append((image.name, image.reason))
            else:
                raise TooManyCorruptImagesError(
                    f"{_REPLACEMENTS} images of {self.source.name} in a row could not be read, the last being "
                    f"{bad[-1][0]} ({bad[-1][1]}); see whether the files are still there"
                )
        return bad

    def _candidates(self, order: np.ndarray, epoch: int, position: int) -> Iterator[int]:
        """The image of a position, then those that stand in for it when it cannot be read."""
        yield int(order[position])
        gen = generator(self.seed, "replace", epoch, position)
        for place in torch.randint(len(order), (_REPLACEMENTS - 1,), generator=gen).tolist():
            yield int(order[place])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {epoch: epoch_order(self.indices, self.seed, epoch, self.source.chunks)}
        return self._orders[epoch]


def eval_images(
    source: Source, indices: np.ndarray, size: tuple[int, int], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (image numbers (b,) int64, images (b, 3, h, w) uint8) over `indices`, in their order, each image whole.

    Each is cut centrally to the shape of `size` and resized (bicubic, antialiased). Images that cannot be read are left
    out, and so are their numbers; b is batch_size but for the last.
    """
    numbers: list[int] = []
    images: list[torch.Tensor] = []
    for index in indices.tolist():
        try:
            images.append(centre_view(source.load(index), size))
        except ImageDecodeError:
            continue
        numbers.append(index)
        if len(numbers) == batch_size:
            yield np.array(numbers, dtype=np.int64), torch.stack(images).numpy()
            numbers, images = [], []
    if numbers:
        yield np.array(numbers, dtype=np.int64), torch.stack(images).numpy()
