"""A module as a user writes it for `plugins`: it registers a data source, a target, a decoder and a timm model."""

from __future__ import annotations

from typing import Any

import numpy as np
from timm.models import register_model
from timm.models.vision_transformer import _create_vision_transformer
from torch import Tensor
from torch.utils.data import Dataset

from bim.models.decoders import DECODERS, LocalDecoder
from bim.models.targets import TARGETS, PixelTarget
from bim.orchestrator.data.source import SOURCES


class Stripes(Dataset[Any]):
    """Stripes of four widths on noise, without labels."""

    def __init__(self, count: str) -> None:
        self.count = int(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        image = np.random.default_rng(index).integers(0, 80, (16, 16, 3), np.uint8)
        image[:, :: 2 + index % 4] += 150
        return image


class HalfTarget(PixelTarget):
    """Half of every pixel."""

    def __init__(self, unit: int) -> None:
        super().__init__(unit, normalize=False)

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images) / 2

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        return super().to_image(2 * prediction, images)


class CountedDecoder(LocalDecoder):
    """The local decoder under another name."""

    built = 0

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        CountedDecoder.built += 1


@register_model
def vit_own(pretrained: bool = False, **keywords: Any) -> Any:
    """A tiny ViT without a pretrained configuration."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return _create_vision_transformer("vit_own", pretrained=pretrained, **(sizes | keywords))


SOURCES["stripes"] = Stripes
TARGETS["half"] = HalfTarget
DECODERS["counted"] = CountedDecoder
