"""Batches of uint8 images: augmented ones for training, addressed by step, and whole ones for evaluation, in order.

A training batch is a function of (seed, step, micro_step) alone: not of the number of workers, of earlier requests,
or of where a run was resumed. Normalization happens on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from bim.models.seeding import generator
from bim.orchestrator.data.crops import DRAWS_PER_CROP, RandomResizedCrop
from bim.orchestrator.data.errors import DataError, ImageDecodeError, TooManyCorruptImagesError
from bim.orchestrator.data.phases import Phase, PhaseSpec, phase_at, phases_on
from bim.orchestrator.data.prefetch import Prefetcher
from bim.orchestrator.data.sampler import epoch_permutation
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.data.whole_images import decoded_images

_MAX_CANDIDATES = 32  # images tried for one position; if none is readable, the data is bad and not an image
_PROBED_IMAGES = 16  # of a split, tried before anything starts


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Args:
        images: (B, 3, h, w) uint8, owned by the caller.
        bad: (sample id, reason) of every image that could not be decoded, also of those reported before.
        load_s: seconds the caller waited for this batch.
    """

    images: np.ndarray
    bad: tuple[tuple[str, str], ...]
    load_s: float


class TrainBatches:
    """Augmented batches of the images `indices` of `source`; any step at any time, the following ones prefetched.

    An epoch visits the images in its own permutation; images that fill no whole step are left out of that epoch.
    The caller closes it.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        phases: Sequence[PhaseSpec],
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: bool,
        seed: int,
        workers: int,
    ) -> None:
        """workers: number of worker processes; 0 reads in this process on request.

        Raises DataError if `indices` hold less than one step, ValueError for a wrong crop, phase or count.
        """
        if workers < 0:
            raise ValueError(f"data.workers is {workers}; give at least 0")
        self.phases = phases_on(phases, len(indices), source.name)
        self.steps_per_epoch = self.phases[0].steps_per_epoch
        """Optimizer steps per epoch of the first phase."""
        self._readers = {
            phase: TrainReader(
                source, indices, phase, RandomResizedCrop(phase.size, crop_scale, crop_ratio, flip), seed
            )
            for phase in self.phases
        }
        self._workers = workers
        self._active: tuple[Phase, Prefetcher[tuple[str, str]]] | None = None
        if workers:
            self._prefetcher(self.phases[0])

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        """Micro-batch `micro_step` of optimizer step `step` (from 0, over all epochs); sequential access is prefetched.

        Raises TooManyCorruptImagesError if hardly any image can be decoded, DataWorkerError if a worker process died.
        """
        if step < 0 or not 0 <= micro_step < phase_at(self.phases, step).grad_accum_steps:
            raise ValueError(f"step {step}, micro_step {micro_step} is outside of {self.phases}")
        start = time.perf_counter()
        phase = phase_at(self.phases, step)
        number = (step - phase.first_step) * phase.grad_accum_steps + micro_step
        bad: Sequence[tuple[str, str]]
        if self._workers:
            images, bad = self._prefetcher(phase).get(number)
        else:
            reader = self._readers[phase]
            images = np.empty(reader.batch_shape, dtype=np.uint8)
            bad = reader.fill(images, number, 0)
        return Batch(images, tuple(bad), time.perf_counter() - start)

    def _prefetcher(self, phase: Phase) -> Prefetcher[tuple[str, str]]:
        """The prefetcher of this phase; that of another phase is closed."""
        if self._active is None or self._active[0] != phase:
            self.close()
            self._active = (phase, Prefetcher(self._readers[phase], self._workers))
        return self._active[1]

    def close(self) -> None:
        """End the workers; idempotent."""
        if self._active is not None:
            self._active[1].close()


class TrainReader:
    """Fills any part of any training batch of one phase, by the batch's number in the phase; runs in the workers."""

    def __init__(
        self, source: Source, indices: np.ndarray, phase: Phase, crop: RandomResizedCrop, seed: int
    ) -> None:
        self.source = source
        self.indices = np.sort(indices)  # a permutation does not depend on how the split is listed
        self.batch_size = phase.batch_size
        self.first_epoch = phase.first_epoch
        self.batches_per_epoch = phase.steps_per_epoch * phase.grad_accum_steps
        self.crop = crop
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """(B, 3, h, w)."""
        return (self.batch_size, 3, *self.crop.size)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[str, str]]:
        """Write images start..start+len(out)-1 of batch `number` to out (n, 3, h, w); -> (sample id, reason) of bad ones.

        Raises TooManyCorruptImagesError if an image and all of its replacements cannot be read.
        """
        epoch_in_phase, batch_in_epoch = divmod(number, self.batches_per_epoch)
        epoch = self.first_epoch + epoch_in_phase
        permutation = self._permutation(epoch)
        bad: list[tuple[str, str]] = []
        for offset, target in enumerate(torch.from_numpy(out)):
            position = batch_in_epoch * self.batch_size + start + offset
            gen = generator(self.seed, "augment", epoch, position)
            draws = torch.rand(DRAWS_PER_CROP, generator=gen).tolist()
            for index in self._candidates(permutation, epoch, position):
                try:
                    target.copy_(self.crop(self.source.load(index), draws))
                    break
                except ImageDecodeError as error:
                    bad.append((error.sample_id, error.reason))
            else:
                raise TooManyCorruptImagesError(
                    f"{_MAX_CANDIDATES} images of {self.source.name} in a row could not be read, the last being "
                    f"{bad[-1][0]} ({bad[-1][1]}); check that the files exist and are intact"
                )
        return bad

    def _candidates(self, permutation: np.ndarray, epoch: int, position: int) -> Iterator[int]:
        """The image of a position, then its replacements if it cannot be decoded."""
        yield int(permutation[position])
        gen = generator(self.seed, "replace", epoch, position)
        for replacement in torch.randint(len(permutation), (_MAX_CANDIDATES - 1,), generator=gen).tolist():
            yield int(permutation[replacement])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations = {
                epoch: epoch_permutation(self.indices, self.seed, epoch, self.source.chunks)
            }
        return self._permutations[epoch]


class BadImages:
    """Unreadable images that an evaluation met, by sample id, each once.

    max_fraction: of the images of one split (or of a sample of it), above which `add` raises.
    """

    def __init__(self, max_fraction: float = 1.0) -> None:
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}

    def add(self, error: ImageDecodeError, num_images: int) -> None:
        """Count an image of `num_images` that are read. Raises TooManyCorruptImagesError."""
        self.reasons[error.sample_id] = error.reason
        allowed = math.ceil(self.max_fraction * num_images)
        if len(self.reasons) > allowed:
            raise TooManyCorruptImagesError(
                f"{len(self.reasons)} of {num_images} images could not be read, the last being {error}, and "
                f"data.max_bad_fraction allows {allowed}; repair or remove them, or raise it"
            )


def check_readable(source: Source, splits: Splits) -> None:
    """Raise DataError for a split of which none of a handful of images can be decoded; mostly reads one image of each."""
    for name in ("train", "val", "test"):
        indices: np.ndarray = getattr(splits, name)
        gen = generator(0, "readable", name)
        tried = indices[torch.randperm(len(indices), generator=gen)[:_PROBED_IMAGES].numpy()]
        problem: ImageDecodeError | None = None
        for index in tried.tolist():
            try:
                source.load(index)
                break
            except ImageDecodeError as error:
                problem = problem or error
        else:
            if problem is not None:
                raise DataError(
                    f"none of {len(tried)} images of the {name} split of {source.name} can be read; the first: {problem}"
                )


def eval_images(
    source: Source,
    indices: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
    bad: BadImages | None = None,
    workers: int = 0,
    check: Callable[[], None] | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Yield (image numbers (b,) int64, images (b, 3, h, w) uint8) over `indices`, in their order, center-cropped.

    Images that cannot be decoded are left out, and so are their numbers; b is batch_size but for the last batch.
    They are counted in `bad`, which raises TooManyCorruptImagesError above its limit.

    workers, check: see `decoded_images`. With workers, close the generator (`contextlib.closing`).
    """
    numbers: list[int] = []
    images: list[torch.Tensor] = []
    with closing(decoded_images(source, indices, size, workers, check)) as decoded:
        for index, image in decoded:
            if isinstance(image, ImageDecodeError):
                if bad is not None:
                    bad.add(image, len(indices))
                continue
            images.append(image)
            numbers.append(index)
            if len(numbers) == batch_size:
                yield np.array(numbers, dtype=np.int64), torch.stack(images).numpy()
                numbers, images = [], []
    if numbers:
        yield np.array(numbers, dtype=np.int64), torch.stack(images).numpy()
