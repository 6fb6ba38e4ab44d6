"""Pixels as the prediction target, normalized per patch as in MAE (arXiv 2111.06377) or unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from bim.models.tokens import patchify, unpatchify

# MAE adds this to the unbiased variance of a patch, which may be zero.
VARIANCE_EPS = 1e-6


class PixelTarget:
    """The pixels of each patch of `patch_px` x `patch_px`, in (row, column, channel) order; see `targets.Target`.

    normalize: give each patch zero mean and unit variance over its own values, as MAE does.
    """

    def __init__(self, patch_px: int, normalize: bool = True) -> None:
        self.patch_px = patch_px
        self.normalize = normalize
        self.out_dim = patch_px * patch_px * 3
        self.head_init = (1.0, 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalized float -> (B, N, out_dim)."""
        patches = patchify(images, self.patch_px)
        if not self.normalize:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """(B, N, out_dim) -> (B, 3, H, W) on the scale of `images`.

        A normalized prediction has no mean and contrast; both are those of the original patch.
        """
        if self.normalize:
            mean, std = patch_statistics(patchify(images, self.patch_px))
            prediction = prediction * std + mean
        return unpatchify(
            prediction, self.patch_px, (images.shape[-2] // self.patch_px, images.shape[-1] // self.patch_px)
        )


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, V) -> mean and standard deviation (unbiased variance plus MAE's eps) of each patch, each (B, N, 1)."""
    mean = patches.mean(dim=-1, keepdim=True)
    # Tensor.var is several times slower over a short last dimension on a CPU.
    squares = torch.linalg.vector_norm(patches - mean, dim=-1, keepdim=True).square()
    return mean, (squares / (patches.shape[-1] - 1) + VARIANCE_EPS).sqrt()
