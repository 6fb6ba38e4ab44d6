"""What every model of one evaluation is measured on, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bim.models.tokens import normalize_images
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.records import EvalConfig


@dataclass(frozen=True)
class EvalInputs:
    """Images, their transform, the device and the protocol: the same for all models that are compared.

    Args:
        source, splits: the images and which of them a score is fitted on and counted on.
        size: (height, width) of the images that models take.
        mean, std: of a channel, over pixels in 0..1.
        device: where models compute.
        workers: processes that decode images, at most; few images need none, see `data.whole_images`.
    """

    source: Source
    splits: Splits
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    config: EvalConfig
    workers: int = 0

    def normalized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, H, W) float32 on the device."""
        return normalize_images(images.to(self.device), self.mean, self.std)
