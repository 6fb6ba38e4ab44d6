"""From an image of any size to one of the wanted size, in uint8: random resized crop with flip for training, the whole
image's centre for evaluation. Bicubic with antialiasing, as MAE does it. Draws nothing itself: chance is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

_ATTEMPTS = 10
DRAWS = 2 * _ATTEMPTS + 3  # uniform numbers that one crop takes: (area, ratio) per attempt, top, left, flip


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop (GoogLeNet's, MAE's): size (h, w) in pixels; scale: least and greatest share of the image's
    area; ratio: least and greatest width / height; flip: mirror half of the images."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"data.crop_scale {self.scale} is no range of area shares; give 0 < least <= greatest <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"the crop's ratio {self.ratio} is no range of width / height; give 0 < least <= greatest"
            )

    def __call__(self, image: Tensor, draws: Sequence[float]) -> Tensor:
        """image: (3, H, W) uint8, draws: DRAWS numbers in [0, 1) -> (3, h, w) uint8."""
        top, left, height, width = crop_box(image.shape[1], image.shape[2], self.scale, self.ratio, draws)
        cropped = image[:, top : top + height, left : left + width]
        resized = resize(cropped, self.size)
        return resized.flip(2) if self.flip and draws[-1] < 0.5 else resized


def crop_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop: area uniform in `scale`, ratio log-uniform in `ratio`, place uniform.

    Of ten tries the first that fits inside the image is taken; if none does, the largest centred box whose ratio lies
    in `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        shape = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[-3] * (height - h + 1))
            left = int(draws[-2] * (width - w + 1))
            return top, left, h, w
    return _centred_box(height, width, min(max(width / height, ratio[0]), ratio[1]))


def _centred_box(height: int, width: int, shape: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest box with width / height = shape inside the image, at its centre."""
    w, h = max(1, min(width, round(height * shape))), max(1, min(height, round(width / shape)))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_view(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centred part of `size`'s shape, resized to it. (3, H, W) uint8 -> (3, h, w) uint8.

    For a square size the whole short side is seen, as if the image were resized to it and cut at the centre; cutting
    first keeps a panorama of 10,000 x 10 pixels from becoming gigabytes.
    """
    top, left, height, width = _centred_box(image.shape[1], image.shape[2], size[1] / size[0])
    cropped = image[:, top : top + height, left : left + width]
    return resize(cropped, size)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 -> (3, h, w) uint8, bicubic with antialiasing: what torchvision's `resize` gives, bit by bit.

    Not called from there, since importing torchvision takes every loader process longer than importing torch.
    """
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
