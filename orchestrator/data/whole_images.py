"""Whole images decoded in order, as an evaluation reads them: in this process, or in workers where that is sooner done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from bim.orchestrator.data.crops import center_crop_resize
from bim.orchestrator.data.errors import DataWorkerError, ImageDecodeError
from bim.orchestrator.data.prefetch import Prefetcher
from bim.orchestrator.data.source import Source

WORKERS_FROM_S = 30.0
"""Seconds of decoding that must be left for workers to take it over: they take seconds to start, on a busy machine many."""

DECIDED_EVERY = 32
"""Images decoded in this process between two estimates of the seconds that are left."""

FILLED_TOGETHER = 64
"""Images that the workers fill together; they are three such parts ahead, whatever batch the consumer makes of them."""

Decoded = Generator[tuple[int, Tensor | ImageDecodeError], None, int]
"""(image number, image (3, h, w) uint8 or why there is none) of every image; returns how many they are."""

log = logging.getLogger(__name__)


class WholeImageReader:
    """Fills any part of any batch of center-cropped images, in the order of `indices`; runs in the workers.

    The last batch need not be full.

    A bad item is (position in the batch, sample id, reason); its pixels are whatever was there before.
    """

    def __init__(self, source: Source, indices: np.ndarray, size: tuple[int, int]) -> None:
        self.source = source
        self.indices = indices
        self.batch_shape = (FILLED_TOGETHER, 3, *size)

    def fill(self, out: np.ndarray, number: int, start: int) -> list[tuple[int, str, str]]:
        """Write images start..start+len(out)-1 of batch `number` to out (n, 3, h, w). Past the end nothing is written."""
        first = number * self.batch_shape[0] + start
        bad: list[tuple[int, str, str]] = []
        part = self.indices[first : first + len(out)].tolist()
        for offset, (index, target) in enumerate(zip(part, torch.from_numpy(out), strict=False)):
            try:
                target.copy_(center_crop_resize(self.source.load(index), self.batch_shape[2:]))
            except ImageDecodeError as error:
                bad.append((start + offset, error.sample_id, error.reason))
        return bad


def decoded_images(
    source: Source,
    indices: np.ndarray,
    size: tuple[int, int],
    workers: int = 0,
    check: Callable[[], None] | None = None,
) -> Decoded:
    """Decode the images of `indices` once each, in their order, center-cropped to `size`.

    This process decodes the first ones. Once these tell that the others would take it more than `WORKERS_FROM_S`, worker
    processes go on, a few images ahead of the consumer; closing the generator ends them. If one of them dies, or none can
    be started, this process decodes the rest. The images are the same either way.

    Args:
        workers: worker processes, at most; 0: none.
        check: called before every image, and a few times a second while a worker is waited for; it may raise.
    """
    position, measured, seconds = 0, 0, 0.0
    while position < len(indices):
        is_due = workers > 0 and measured > 0 and position % DECIDED_EVERY == 0
        if is_due and (len(indices) - position) * seconds / measured > WORKERS_FROM_S:
            reader = WholeImageReader(source, indices[position:], size)
            position += yield from _decoded_in_workers(reader, workers, check)
            workers = 0  # those that died once are not tried again
            continue
        if check is not None:
            check()
        index = int(indices[position])
        start = time.perf_counter()
        image: Tensor | ImageDecodeError
        try:
            image = center_crop_resize(source.load(index), size)
        except ImageDecodeError as error:
            image = error
        if position:  # the first one imports decoders
            seconds += time.perf_counter() - start
            measured += 1
        position += 1
        yield index, image
    return position


def _decoded_in_workers(reader: WholeImageReader, workers: int, check: Callable[[], None] | None) -> Decoded:
    """Returns how many images were decoded: not all of them if a worker died or could not be started."""
    try:
        prefetcher = Prefetcher(reader, workers)
    except OSError as error:
        log.warning(
            "no worker process can be started to decode images (%s); this process decodes them", error
        )
        return 0
    indices = reader.indices
    try:
        for first in range(0, len(indices), FILLED_TOGETHER):
            try:
                items, bad = prefetcher.get(first // FILLED_TOGETHER, check)
            except DataWorkerError as error:
                log.warning("%s; meanwhile the other images are decoded in this process", error)
                return first
            images = torch.from_numpy(items)
            errors = {position: ImageDecodeError(*reasons) for position, *reasons in bad}
            for position, index in enumerate(indices[first : first + FILLED_TOGETHER].tolist()):
                yield index, errors.get(position, images[position])
    finally:
        prefetcher.close()
    return len(indices)
