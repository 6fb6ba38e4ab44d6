"""Statistics of batch norms for whole images, since training saw them with most units painted over.

Masked training of a ResNet gathers means and variances of pictures that are three quarters one colour; a variant is used on
whole ones. Only the running statistics change, no weight does. Models without batch norms are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bim.models.seeding import generator
from bim.models.tokens import normalize_images
from bim.orchestrator.data.loader import eval_images
from bim.orchestrator.data.source import Source

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
    seed: int = 0,
    batch_size: int = 256,
) -> None:
    """Replace the running statistics of every batch norm by those of whole training images, all images weighing the same.

    variants: models that take (B, 3, H, W); they are left on `device` in evaluation mode. train: image numbers of the
    training split. size: (height, width).
    """
    norms = {depth: _norms(model) for depth, model in variants.items()}
    wanted = {depth: model for depth, model in variants.items() if norms[depth]}
    if not wanted:
        return
    gen = generator(seed, "batch norms")
    chosen = np.sort(
        train[torch.randperm(len(train), generator=gen)[:IMAGES].numpy()]
    )  # files are read in order
    images = torch.from_numpy(
        np.concatenate([pixels for _, pixels in eval_images(source, chosen, size, batch_size)])
    )
    images = images[torch.randperm(len(images), generator=gen)]  # so that a batch is not one class
    kept = {norm: norm.momentum for found in norms.values() for norm in found}
    for depth, model in wanted.items():
        model.to(device).eval()
        for norm in norms[depth]:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
    with torch.inference_mode():
        for batch in images.tensor_split(-(-len(images) // batch_size)):  # of equal weight
            x = normalize_images(batch.to(device), mean, std)
            for model in wanted.values():
                model(x)
    for norm, momentum in kept.items():
        norm.momentum = momentum
        norm.eval()


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
