"""Upper estimate of the time that a search takes, from a short measurement of its model on its device.

For the user who decides whether to wait; nothing else depends on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bim.orchestrator.data.loader import eval_images
from bim.orchestrator.data.phases import Phase
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.evaluation.features import build_embedders
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.depth_variants import random_variants
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.transport import Payload

IMPORT_S, MIN_START_S = 4.0, 6.0
"""Core-seconds in which a process imports torch, timm and Ray, and seconds that a trial takes to start and end at least."""

MIN_BATCH, MAX_BATCH = 8, 64
"""Images of the first and of the largest timed batch."""

MIN_MEASURE_S = 0.3
"""Seconds of a batch that is long enough to measure; a larger one is not tried."""


@dataclass(frozen=True)
class Throughput:
    """Seconds per image in one process: of a training step through all blocks, and of embedding by every depth variant."""

    train_s: float
    score_s: float


def measure_throughput(spec: PretrainSpec, data: DataSpec, device: str, threads: int) -> Throughput:
    """Measure both on the first training images. Takes a few seconds, or as long as a batch of 8 does."""
    num_threads = torch.get_num_threads()
    source, splits = data.open()
    backbone = open_spec_backbone(spec)
    try:
        stage = Stage(spec, range(len(spec.blocks)), device, threads)
        stage.restore(None, 0)
        step = 0

        def train(images: int) -> None:
            nonlocal step
            _, pixels = next(eval_images(source, splits.train, data.phases[0].size, images))
            stage.train_step(StepRequest(step, lr=0.0), Payload("uint8", pixels), None)
            step += 1

        variants = random_variants(spec, backbone, tuple(info.depth for info in backbone.blocks))
        embedders = build_embedders(variants, spec.mean, spec.std, torch.device(device))

        def embed(images: int) -> None:
            _, pixels = next(eval_images(source, splits.train, backbone.image_size, images))
            for embedder in embedders.values():
                embedder(pixels)

        max_batch = min(data.phases[0].batch_size, MAX_BATCH, len(splits.train))
        return Throughput(_seconds_per_image(train, max_batch), _seconds_per_image(embed, max_batch))
    finally:
        torch.set_num_threads(num_threads)


def _seconds_per_image(work: Callable[[int], None], max_batch: int) -> float:
    batch = min(MIN_BATCH, max_batch)
    work(batch)  # the first call plans kernels and fills caches
    while True:
        start = time.perf_counter()
        work(batch)
        seconds = time.perf_counter() - start
        if seconds > MIN_MEASURE_S or batch == max_batch:
            return seconds / batch
        batch = min(max_batch, 4 * batch)


def start_seconds(processes: int, cores: float) -> float:
    """Seconds in which the processes of one trial start and end on so many cores."""
    return max(MIN_START_S, IMPORT_S * processes / max(1.0, cores))


def trial_seconds(
    throughput: Throughput,
    phases: tuple[Phase, ...],
    epochs: int,
    every_epochs: int,
    images: int,
    speedup: float,
) -> float:
    """Seconds of training and scoring of one trial that is not stopped early.

    images: of a score. speedup: of several concurrent stages over one process.
    """
    ends = [*(phase.first_epoch for phase in phases[1:]), epochs]
    trained_images = 0.0
    for phase, end in zip(phases, ends, strict=True):
        relative_size = math.prod(phase.size) / math.prod(phases[0].size)
        trained_images += (
            (end - phase.first_epoch) * phase.steps_per_epoch * phase.images_per_step * relative_size
        )
    scores = -(-epochs // every_epochs)
    return trained_images * throughput.train_s / speedup + scores * images * throughput.score_s
