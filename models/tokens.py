"""Images to tokens and back: patches, gathers, fixed positions, normalization. Pure functions without parameters.

The values of a token run in (row, column, channel) order inside its patch, tokens row by row over the grid, as in MAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def normalize_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) uint8 in 0..255 -> float32, (images / 255 - mean) / std per channel, on the images' device."""
    channel_mean, channel_std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images.to(torch.float32) / 255.0 - channel_mean) / channel_std


def denormalize_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalize_images`: (B, C, H, W) float -> the same in 0..1, clamped."""
    center, spread = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images * spread + center).clamp(0, 1)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, C, 1, 1) float32, cached: a copy to a GPU synchronizes with it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C), N = (H / patch) * (W / patch).

    Raises ValueError if H or W is no multiple of `patch`.
    """
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"an image of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}"
        )
    rows, columns = height // patch, width // patch
    patches = images.reshape(batch, channels, rows, patch, columns, patch)
    # (B, C, rows, p, columns, p) -> (B, rows, columns, p, p, C)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, patch * patch * C) -> (B, C, H, W), the inverse of `patchify` on a grid of (rows, columns)."""
    batch = tokens.shape[0]
    rows, columns = grid
    patches = tokens.reshape(batch, rows, columns, patch, patch, -1)
    # (B, rows, columns, p, p, C) -> (B, C, rows, p, columns, p)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, columns * patch)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, N, C), index: (B, M) int64 -> (B, M, C), the tokens at the indices of each sample."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """(rows * columns, dim) float32: MAE's fixed table. Raises ValueError if dim is no multiple of 4.

    The first half of a row encodes the token's column, the second its row; each half holds its sines, then
    its cosines.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {dim}")
    rows, columns = grid
    # MAE computes the table in float64; so does this, to agree to the last bit of float32.
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def encode(coordinate: Tensor) -> Tensor:
        angle = coordinate[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()
