"""Pixels as the prediction target: MAE's per-patch normalised ones, or as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from bim.models.tokens import patchify, unpatchify

# MAE adds this to the unbiased variance of a patch, so that flat patches stay finite.
VARIANCE_EPS = 1e-6


class PixelTarget:
    """The pixels of each unit of `unit` x `unit`, in (row, column, channel) order; see `targets.Target`.

    With `normalize` (MAE's choice) each unit has zero mean and unit variance over its own values.
    """

    def __init__(self, unit: int, normalize: bool = True) -> None:
        self.unit = unit
        self.normalize = normalize
        self.out_dim = unit * unit * 3
        self.start = (1.0, 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised float -> (B, N, out_dim)."""
        patches = patchify(images, self.unit)
        if not self.normalize:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """(B, N, out_dim) -> (B, 3, H, W) on the scale of `images`, by the statistics of the images' own
        patches.

        A prediction says nothing of a patch's mean and contrast, so a picture of it borrows both from the
        original.
        """
        if self.normalize:
            mean, std = patch_statistics(patchify(images, self.unit))
            prediction = prediction * std + mean
        return unpatchify(
            prediction, self.unit, (images.shape[-2] // self.unit, images.shape[-1] // self.unit)
        )


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, V) -> mean and standard deviation (unbiased variance plus MAE's eps) of each patch, each (B, N, 1)."""
    mean = patches.mean(dim=-1, keepdim=True)
    # Tensor.var takes several times as long over a short last dimension on a CPU: a tenth of a small model's step.
    squares = torch.linalg.vector_norm(patches - mean, dim=-1, keepdim=True).square()
    return mean, (squares / (patches.shape[-1] - 1) + VARIANCE_EPS).sqrt()
