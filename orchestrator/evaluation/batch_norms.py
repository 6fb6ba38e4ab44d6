"""Statistics of batch norms for whole images, since training saw them with most mask units filled.

Masked training of a ResNet gathers means and variances of images of which three quarters have one color; a variant is used
on whole images. Only the running statistics change, no weight does. Models without batch norms are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bim.models.seeding import generator
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.progress import part, report, report_again

IMAGES = 2048
"""Training images that the statistics are gathered from, drawn from the seed where there are more."""


def gather_statistics(variants: Mapping[Any, nn.Module], inputs: EvalInputs) -> dict[str, str]:
    """Replace the running statistics of every batch norm by those of whole training images, all images weighing the same.

    variants: models that take (B, 3, H, W), by any key; they are left on `inputs.device` in evaluation mode. The images are
        decoded once for all of them.
    Returns the unreadable images, by sample id, with the reason.

    Raises:
        TooManyCorruptImagesError: they are more than `inputs.config.max_bad_fraction`.
        DataError: no image can be read.
    """
    norms = {key: _norms(model) for key, model in variants.items() if _norms(model)}
    if not norms:
        return {}
    train, batch_size = inputs.splits.train, inputs.config.batch_size
    gen = generator(inputs.config.seed, "batch norms")
    sample = np.sort(train[torch.randperm(len(train), generator=gen)[:IMAGES].numpy()])  # read in order
    bad_images = BadImages(inputs.config.max_bad_fraction)
    images = torch.empty(len(sample), 3, *inputs.size, dtype=torch.uint8)
    read = 0
    batches = eval_images(
        inputs.source, sample, inputs.size, batch_size, bad_images, inputs.workers, report_again
    )
    with part("batch norms"), closing(batches):
        for _, batch in batches:
            images[read : read + len(batch)] = torch.from_numpy(batch)
            read += len(batch)
            report(f"{read} of {len(sample)} images")
    if not read:
        raise DataError(
            f"no training image of {inputs.source.name} could be read, so batch norms have no statistics"
        )
    shuffled = torch.randperm(read, generator=gen)  # so that a batch is not one class
    momenta = {norm: norm.momentum for of_model in norms.values() for norm in of_model}
    for key, of_model in norms.items():
        variants[key].to(inputs.device).eval()
        for norm in of_model:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
    with torch.inference_mode():
        for rows in shuffled.tensor_split(-(-read // batch_size)):  # of equal weight
            x = inputs.normalized(images[rows])
            for key in norms:
                variants[key](x)
                report_again()
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        norm.eval()
    return bad_images.reasons


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
