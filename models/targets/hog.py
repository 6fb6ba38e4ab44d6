"""Histograms of oriented gradients as the prediction target: FastMIM's, with the details of its authors' layer.

Not the HOG of Dalal and Triggs: neither blocks of cells, nor clipping, nor shares of a gradient for two bins. For the
decoders of blocks of any stride, and for whoever wants to see what they predict.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from bim.models.precision import full_precision

COLOURS = 3

# Gradients up to this are rounding: sums of flat pixels leave up to 1e-6, while one grey level of 8 bits makes 4e-3 and
# more. The reference keeps them, and its norm then blows flat cells up to histograms of length 1.
NOISE = 1e-4

# (row, column, weight), row by row. Summed in this order: see `_correlate`.
SOBEL_X = ((0, 0, 1), (0, 2, -1), (1, 0, 2), (1, 2, -2), (2, 0, 1), (2, 2, -1))
SOBEL_Y = ((0, 0, 1), (0, 1, 2), (0, 2, 1), (2, 0, -1), (2, 1, -2), (2, 2, -1))


class HogTarget:
    """The gradient histograms of each token's cells (papers.md 3.3); see `targets.Target`.

    A cell is `cell` x `cell` pixels. Where cells are no larger than the token (`unit` x `unit` pixels) a token's values are
    its cells' histograms in (colour, bin, cell row, cell column) order: 3 * bins * (unit / cell)^2 of them. Where cells are
    larger, all tokens of a cell share its 3 * bins values.

    normalize: divide every histogram, one colour of one cell, by its L2 norm; a flat one stays zero.

    Holds no tensors: it works on the device of the images, in float32 and without gradients whatever surrounds it.

    Raises ValueError if cell or bins is no positive whole number, or if neither of cell and unit divides the other.
    """

    def __init__(self, unit: int, cell: int = 8, bins: int = 9, normalize: bool = True) -> None:
        for name, value in (("target.cell", cell), ("target.bins", bins)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 up")
        if unit % cell and cell % unit:
            raise ValueError(
                f"target.cell {cell} does not fit tokens of {unit} x {unit} pixels; one must divide the other"
            )
        self.unit = unit
        self.cell = cell
        self.bins = bins
        self.normalize = normalize
        self.cells_per_side = max(1, unit // cell)
        self.out_dim = COLOURS * bins * self.cells_per_side**2
        # Of a histogram of length 1 no value is negative and most are small: photographs give a mean of 0.2 and a deviation
        # of 0.25. A head that begins far off teaches the encoder nothing for hundreds of steps.
        self.start = (0.1, 0.6 / math.sqrt(bins)) if normalize else (1.0, 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised float -> (B, N, out_dim) float32.

        Raises ValueError if H or W is no multiple of both cell and unit.
        """
        self._check_sides(images)
        histograms = self.cells(images)
        if self.cell > self.unit:
            tokens_per_side = self.cell // self.unit
            for dim in (2, 3):
                histograms = histograms.repeat_interleave(tokens_per_side, dim)
        batch, channels, height, width = histograms.shape
        k = self.cells_per_side
        tokens = histograms.reshape(batch, channels, height // k, k, width // k, k)
        # (B, C, rows, k, columns, k) -> (B, rows, columns, C, k, k)
        return tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, self.out_dim)

    @torch.no_grad()
    def cells(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 * bins, H / cell, W / cell) float32, channel = colour * bins + bin.

        Brightness that rises to the right is in the middle bin; a bin further clockwise on the screen is one less.
        Raises ValueError if H or W is no multiple of cell.
        """
        self._check_sides(images, self.cell)
        batch, colours, height, width = images.shape
        with full_precision(images.device):
            padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
            gx, gy = _correlate(padded, SOBEL_X), _correlate(padded, SOBEL_Y)
            magnitude = F.threshold(torch.hypot(gx, gy), NOISE, 0.0)
            bin_of = torch.atan2(gx, gy).div_(math.pi).mul_(self.bins).floor_().remainder_(self.bins)
            rows, columns = height // self.cell, width // self.cell
            histograms = magnitude.new_empty(batch, colours, self.bins, rows, columns)
            share = torch.empty_like(magnitude)
            # Bin after bin: a scatter would be quicker, but on GPUs its sums would differ from run to run.
            for index in range(self.bins):
                torch.eq(bin_of, index, out=share).mul_(magnitude)
                by_cell = share.view(batch, colours, rows, self.cell, columns, self.cell)
                histograms[:, :, index] = by_cell.sum(dim=(3, 5))
            if self.normalize:
                histograms = F.normalize(histograms, dim=2)
        return histograms.flatten(1, 2)

    @torch.no_grad()
    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """(B, N, out_dim) -> (B, 3, H, W) on the scale of `images`: strokes along the edges, the brighter the stronger.

        Each colour channel shows its own histograms over the middle of the batch's range. White is a length of 1 or, without
        `normalize`, the strongest value of the image itself. Tokens that share a cell each show their part of its strokes.
        """
        self._check_sides(images)
        batch, _, height, width = images.shape
        k, side = self.cells_per_side, min(self.cell, self.unit)
        tokens = prediction.float().reshape(
            batch, height // self.unit, width // self.unit, COLOURS, self.bins, k, k
        )
        # (B, rows, columns, 3, bins, k, k) -> (bins, B, 3, rows, k, columns, k)
        strengths = tokens.permute(4, 0, 3, 1, 5, 2, 6).reshape(
            self.bins, batch, COLOURS, height // side, width // side
        )
        if not self.normalize:
            strongest = self.cells(images).amax(dim=(1, 2, 3)).clamp(min=1e-6)
            strengths = strengths / strongest.view(1, batch, 1, 1, 1)
        tiles = strokes(self.cell, self.bins).to(images.device)
        tiles = tiles.tile(1, height // self.cell, width // self.cell)  # (bins, H, W)
        # The strongest stroke through a pixel, not their sum: all pass through the middle of the cell.
        drawn = reduce(
            torch.maximum,
            (
                F.interpolate(strength, scale_factor=side, mode="nearest") * tile
                for strength, tile in zip(strengths, tiles, strict=True)
            ),
        )
        light = images.amax(dim=(0, 2, 3), keepdim=True)
        grey = (images.amin(dim=(0, 2, 3), keepdim=True) + light) / 2
        return grey + (light - grey) * drawn.clamp(0, 1)

    def _check_sides(self, images: Tensor, divisor: int | None = None) -> None:
        divisor = divisor or max(self.cell, self.unit)  # the larger is a multiple of the other
        height, width = images.shape[-2:]
        if height % divisor or width % divisor:
            raise ValueError(
                f"images of {height} x {width} pixels with target.cell {self.cell} and tokens of {self.unit} x {self.unit} "
                f"pixels: both sides must be multiples of {divisor}"
            )


def strokes(cell: int, bins: int) -> Tensor:
    """(bins, cell, cell) in 0..1: for each bin a soft line through the cell's middle, along the bin's edges."""
    # Of the edge, at right angles to the bin's middle gradient.
    angle = -math.pi * (torch.arange(bins) + 0.5) / bins
    place = torch.arange(cell) + 0.5 - cell / 2
    y, x = place.view(1, -1, 1), place.view(1, 1, -1)
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    away = (x * sine - y * cosine).abs()
    along = (x * cosine + y * sine).abs()
    half_width = max(1.0, cell / 8) / 2
    return (half_width + 0.5 - away).clamp(0, 1) * (cell / 2 - along).clamp(0, 1)


def _correlate(padded: Tensor, taps: tuple[tuple[int, int, int], ...]) -> Tensor:
    """The 3 x 3 cross-correlation of (B, C, H + 2, W + 2) with `taps`: (B, C, H, W).

    Summed tap by tap, not by a convolution: in pictures of 8 bits very many gradients are zero but for rounding, right at
    the border between the last bin and bin 0, so the order of the sum decides their bin. In this order it is the
    reference's bin, whatever the device's convolutions do (TF32 included).
    """
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    total = torch.zeros_like(padded[..., :height, :width])
    for row, column, weight in taps:
        total.add_(padded[..., row : row + height, column : column + width], alpha=weight)
    return total
