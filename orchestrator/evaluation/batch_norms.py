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
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.evaluation.inputs import EvalInputs

IMAGES = 2048
"""Training images that the statistics are gathered from, drawn from the seed where there are more."""


def gather_statistics(variants: Mapping[int, nn.Module], inputs: EvalInputs) -> dict[str, str]:
    """Replace the running statistics of every batch norm by those of whole training images, all images weighing the same.

    variants: models that take (B, 3, H, W); they are left on `inputs.device` in evaluation mode.
    Returns the unreadable images, by sample id, with the reason.

    Raises:
        TooManyCorruptImagesError: they are more than `inputs.config.max_bad_fraction`.
        DataError: no image can be read.
    """
    norms = {depth: _norms(model) for depth, model in variants.items() if _norms(model)}
    if not norms:
        return {}
    train, batch_size = inputs.splits.train, inputs.config.batch_size
    gen = generator(inputs.config.seed, "batch norms")
    sample = np.sort(train[torch.randperm(len(train), generator=gen)[:IMAGES].numpy()])  # read in order
    met = BadImages(inputs.config.max_bad_fraction)
    batches = [batch for _, batch in eval_images(inputs.source, sample, inputs.size, batch_size, met)]
    if not batches:
        raise DataError(
            f"no training image of {inputs.source.name} could be read, so batch norms have no statistics"
        )
    pixels = np.concatenate(batches)
    # Shuffled, so that a batch is not one class.
    images = torch.from_numpy(pixels)[torch.randperm(len(pixels), generator=gen)]
    momenta = {norm: norm.momentum for of_model in norms.values() for norm in of_model}
    for depth, of_model in norms.items():
        variants[depth].to(inputs.device).eval()
        for norm in of_model:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
    with torch.inference_mode():
        for batch in images.tensor_split(-(-len(images) // batch_size)):  # of equal weight
            x = inputs.normalized(batch)
            for depth in norms:
                variants[depth](x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        norm.eval()
    return met.reasons


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
