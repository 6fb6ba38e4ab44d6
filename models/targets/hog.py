"""Histograms of oriented gradients (HOG) as the prediction target: FastMIM's layer (arXiv 2212.06593).

Unlike the HOG of Dalal and Triggs it has no blocks of cells, no clipping and no interpolation between bins. It serves
blocks of any stride, and turns predictions into pictures.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from bim.models.precision import autocast_disabled

COLORS = 3

# Gradients up to this are rounding errors: sums of flat pixels leave up to 1e-6, one gray level of 8 bits makes at least
# 4e-3. The reference keeps them, and its norm then scales flat cells to histograms of length 1.
ROUNDING_THRESHOLD = 1e-4

# (row, column, weight), row by row. Summed in this order: see `_correlate`.
SOBEL_X = ((0, 0, 1), (0, 2, -1), (1, 0, 2), (1, 2, -2), (2, 0, 1), (2, 2, -1))
SOBEL_Y = ((0, 0, 1), (0, 1, 2), (0, 2, 1), (2, 0, -1), (2, 1, -2), (2, 2, -1))


class HogTarget:
    """The gradient histograms of the HOG cells of each token; see `targets.Target`.

    A cell is `cell` x `cell` pixels, a token `patch_px` x `patch_px`. Where cells are no larger than tokens, the values of a
    token are the histograms of its cells in (color, bin, cell row, cell column) order: 3 * bins * (patch_px / cell)^2.
    Where cells are larger, all tokens of a cell share its 3 * bins values.

    normalize: divide every histogram (one color of one cell) by its L2 norm; a flat one stays zero.

    It holds no tensors and computes on the device of the images, in float32 and without gradients.
    Raises ValueError if cell or bins is no positive whole number, or if neither of cell and patch_px divides the other.
    """

    def __init__(self, patch_px: int, cell: int = 8, bins: int = 9, normalize: bool = True) -> None:
        for name, value in (("target.cell", cell), ("target.bins", bins)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 up")
        if patch_px % cell and cell % patch_px:
            raise ValueError(
                f"target.cell {cell} does not fit tokens of {patch_px} x {patch_px} pixels; one must divide the other"
            )
        self.patch_px = patch_px
        self.cell = cell
        self.bins = bins
        self.normalize = normalize
        self.cells_per_side = max(1, patch_px // cell)
        self.out_dim = COLORS * bins * self.cells_per_side**2
        # Values of a normalized histogram are small and not negative: photographs have mean 0.2 and standard deviation
        # 0.25. With a head that starts far from them the encoder learns nothing for hundreds of steps.
        self.head_init = (0.1, 0.6 / math.sqrt(bins)) if normalize else (1.0, 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalized float -> (B, N, out_dim) float32.

        Raises ValueError if H or W is no multiple of both cell and patch_px.
        """
        self._check_sides(images)
        histograms = self.cells(images)
        if self.cell > self.patch_px:
            tokens_per_side = self.cell // self.patch_px
            for dim in (2, 3):
                histograms = histograms.repeat_interleave(tokens_per_side, dim)
        batch, channels, height, width = histograms.shape
        k = self.cells_per_side
        tokens = histograms.reshape(batch, channels, height // k, k, width // k, k)
        # (B, C, rows, k, columns, k) -> (B, rows, columns, C, k, k)
        return tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, self.out_dim)

    @torch.no_grad()
    def cells(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 * bins, H / cell, W / cell) float32, channel = color * bins + bin.

        A gradient to the right is in the middle bin; one bin clockwise on the screen is one bin less.
        Raises ValueError if H or W is no multiple of cell.
        """
        self._check_sides(images, self.cell)
        batch, colors, height, width = images.shape
        with autocast_disabled(images.device):
            padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
            gx, gy = _correlate(padded, SOBEL_X), _correlate(padded, SOBEL_Y)
            magnitude = F.threshold(torch.hypot(gx, gy), ROUNDING_THRESHOLD, 0.0)
            bin_of = torch.atan2(gx, gy).div_(math.pi).mul_(self.bins).floor_().remainder_(self.bins)
            rows, columns = height // self.cell, width // self.cell
            histograms = magnitude.new_empty(batch, colors, self.bins, rows, columns)
            in_bin = torch.empty_like(magnitude)
            # Bin after bin: a scatter is faster, but its sums on GPUs are not deterministic.
            for index in range(self.bins):
                torch.eq(bin_of, index, out=in_bin).mul_(magnitude)
                by_cell = in_bin.view(batch, colors, rows, self.cell, columns, self.cell)
                histograms[:, :, index] = by_cell.sum(dim=(3, 5))
            if self.normalize:
                histograms = F.normalize(histograms, dim=2)
        return histograms.flatten(1, 2)

    @torch.no_grad()
    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """(B, N, out_dim) -> (B, 3, H, W) on the scale of `images`: strokes along the edges, brighter for stronger ones.

        Each color channel shows its own histograms above the middle of the batch's range. The maximum stands for
        1 or, without `normalize`, for the strongest value of the image. Tokens of one cell each show their part of it.
        """
        self._check_sides(images)
        batch, _, height, width = images.shape
        k, side = self.cells_per_side, min(self.cell, self.patch_px)
        tokens = prediction.float().reshape(
            batch, height // self.patch_px, width // self.patch_px, COLORS, self.bins, k, k
        )
        # (B, rows, columns, 3, bins, k, k) -> (bins, B, 3, rows, k, columns, k)
        strengths = tokens.permute(4, 0, 3, 1, 5, 2, 6).reshape(
            self.bins, batch, COLORS, height // side, width // side
        )
        if not self.normalize:
            strongest = self.cells(images).amax(dim=(1, 2, 3)).clamp(min=1e-6)
            strengths = strengths / strongest.view(1, batch, 1, 1, 1)
        tiles = strokes(self.cell, self.bins).to(images.device)
        tiles = tiles.tile(1, height // self.cell, width // self.cell)  # (bins, H, W)
        # The strongest stroke through a pixel, not the sum: all pass through the center of the cell.
        drawn = reduce(
            torch.maximum,
            (
                F.interpolate(strength, scale_factor=side, mode="nearest") * tile
                for strength, tile in zip(strengths, tiles, strict=True)
            ),
        )
        brightest = images.amax(dim=(0, 2, 3), keepdim=True)
        middle = (images.amin(dim=(0, 2, 3), keepdim=True) + brightest) / 2
        return middle + (brightest - middle) * drawn.clamp(0, 1)

    def _check_sides(self, images: Tensor, divisor: int | None = None) -> None:
        divisor = divisor or max(self.cell, self.patch_px)  # the larger is a multiple of the other
        height, width = images.shape[-2:]
        if height % divisor or width % divisor:
            raise ValueError(
                f"images of {height} x {width} pixels with target.cell {self.cell} and tokens of "
                f"{self.patch_px} x {self.patch_px} pixels: both sides must be multiples of {divisor}"
            )


def strokes(cell: int, bins: int) -> Tensor:
    """(bins, cell, cell) in 0..1: for each bin a soft line through the center of the cell, along the bin's edges."""
    # The edge is at right angles to the bin's middle gradient.
    angle = -math.pi * (torch.arange(bins) + 0.5) / bins
    offsets = torch.arange(cell) + 0.5 - cell / 2
    y, x = offsets.view(1, -1, 1), offsets.view(1, 1, -1)
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    across = (x * sine - y * cosine).abs()
    along = (x * cosine + y * sine).abs()
    half_width = max(1.0, cell / 8) / 2
    return (half_width + 0.5 - across).clamp(0, 1) * (cell / 2 - along).clamp(0, 1)


def _correlate(padded: Tensor, taps: tuple[tuple[int, int, int], ...]) -> Tensor:
    """The 3 x 3 cross-correlation of (B, C, H + 2, W + 2) with `taps`: (B, C, H, W).

    Summed tap by tap, not by a convolution: in 8-bit images many gradients are zero up to rounding, at the border between
    the last bin and bin 0, where the order of summation decides the bin. This order gives the reference's bin on every
    device, also where convolutions use TF32.
    """
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    total = torch.zeros_like(padded[..., :height, :width])
    for row, column, weight in taps:
        total.add_(padded[..., row : row + height, column : column + width], alpha=weight)
    return total
