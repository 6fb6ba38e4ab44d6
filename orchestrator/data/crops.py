"""Image of any size -> image of the training or evaluation size, uint8, bicubic with antialiasing as in MAE.

Random resized crop with flip for training, center crop for evaluation. Randomness is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

_ATTEMPTS = 10
DRAWS_PER_CROP = 2 * _ATTEMPTS + 3  # uniform numbers: (area, ratio) per attempt, top, left, flip

Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels, as torchvision's crop takes them


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random resized crop with horizontal flip.

    Args:
        size: (height, width) of the result in pixels.
        scale: range of the crop's fraction of the image area.
        ratio: range of width / height.
        flip: mirror half of the images.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.crop_scale {self.scale} is not a range of fractions: 0 < min <= max <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop ratio {self.ratio} is not a range of width / height: 0 < min <= max")

    def __call__(self, image: Tensor, draws: Sequence[float]) -> Tensor:
        """image: (3, H, W) uint8, draws: DRAWS_PER_CROP numbers in [0, 1) -> (3, h, w) uint8."""
        box = crop_box(image.shape[1], image.shape[2], self.scale, self.ratio, draws)
        resized = resize(_crop(image, box), self.size)
        return resized.flip(2) if self.flip and draws[-1] < 0.5 else resized


def crop_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]
) -> Box:
    """Box of a random crop: area uniform in `scale`, ratio log-uniform in `ratio`, position uniform.

    The first of ten attempts that fits inside the image counts; if none does, the largest center box whose
    ratio lies in `ratio`.
    """
    log_min, log_max = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        aspect = math.exp(log_min + (log_max - log_min) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-3] * (height - h + 1)), int(draws[-2] * (width - w + 1)), h, w
    return _center_box(height, width, min(max(width / height, ratio[0]), ratio[1]))


def center_crop_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the largest center crop with the aspect of `size`. (3, H, W) uint8 -> (3, h, w) uint8.

    A square size shows the whole short side, as resizing it and cropping the center does; cropping first keeps
    a panorama of 10,000 x 10 pixels from becoming gigabytes.
    """
    return resize(_crop(image, _center_box(image.shape[1], image.shape[2], size[1] / size[0])), size)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing. (3, H, W) uint8 -> (3, h, w) uint8, equal bit for bit to torchvision's `resize`.

    torchvision's function gives the same bytes (625 of 625 test crops) and is not called, because its import doubles the
    start of a worker that reads no JPEG (2.9 s of CPU time instead of 1.5 s).
    """
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)[0]


def _crop(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def _center_box(height: int, width: int, aspect: float) -> Box:
    """The largest box with width / height = aspect inside the image, at its center."""
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w
