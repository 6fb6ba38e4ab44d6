"""Statistics of batch norms for whole images, since training saw them with most mask units filled.

Masked training of a ResNet gathers means and variances of images of which three quarters have one color; a variant is used
on whole images. Only the running statistics change, no weight does. Models without batch norms are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bim.models.seeding import generator
from bim.models.tokens import normalize_images
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.data.source import Source
from bim.orchestrator.evaluation.records import EvalConfig

IMAGES = 2048
"""Training images that the statistics are gathered from, drawn from the seed where there are more."""


def gather_statistics(
    variants: Mapping[int, nn.Module],
    source: Source,
    train: np.ndarray,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    config: EvalConfig,
) -> dict[str, str]:
    """Replace the running statistics of every batch norm by those of whole training images, all images weighing the same.

    variants: models that take (B, 3, H, W); they are left on `device` in evaluation mode. train: indices of the images of
    the training split. size: (height, width). Returns the unreadable images, by sample id, with the reason.

    Raises:
        TooManyCorruptImagesError: they are more than `config.max_bad_fraction`.
        DataError: no image can be read.
    """
    norms = {depth: _norms(model) for depth, model in variants.items() if _norms(model)}
    if not norms:
        return {}
    gen = generator(config.seed, "batch norms")
    sample = np.sort(
        train[torch.randperm(len(train), generator=gen)[:IMAGES].numpy()]
    )  # files are read in order
    met = BadImages(config.max_bad_fraction)
    batches = [batch for _, batch in eval_images(source, sample, size, config.batch_size, met)]
    if not batches:
        raise DataError(
            f"no training image of {source.name} could be read, so batch norms have no statistics"
        )
    pixels = np.concatenate(batches)
    images = torch.from_numpy(pixels)[
        torch.randperm(len(pixels), generator=gen)
    ]  # so that a batch is not one class
    momenta = {norm: norm.momentum for of_model in norms.values() for norm in of_model}
    for depth, of_model in norms.items():
        variants[depth].to(device).eval()
        for norm in of_model:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
    with torch.inference_mode():
        for batch in images.tensor_split(-(-len(images) // config.batch_size)):  # of equal weight
            x = normalize_images(batch.to(device), mean, std)
            for depth in norms:
                variants[depth](x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        norm.eval()
    return met.reasons


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
