"""Images of a given number and size that are made up: for an estimate where the data are elsewhere, and for timings."""

from __future__ import annotations

import hashlib
import io
import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bim.orchestrator.data.decode import decode_rgb
from bim.orchestrator.data.errors import DataError

MAX_IMAGES, MAX_SIDE = 10**9, 20_000

QUALITY = 90


class SyntheticSource:
    """`count` times the same JPEG of `width` x `height` pixels, decoded each time, as real images are."""

    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    fixed_splits: dict[str, np.ndarray] | None = None
    chunks = None

    def __init__(self, count: int, width: int, height: int) -> None:
        self._count, self._width, self._height = count, width, height
        self._jpeg = _jpeg(width, height)

    @classmethod
    def parse(cls, argument: str) -> SyntheticSource:
        """From `COUNTxWIDTHxHEIGHT`. Raises DataError."""
        match = re.fullmatch(r"(\d{1,10})x(\d{1,6})x(\d{1,6})", argument)
        count, width, height = (int(text) for text in match.groups()) if match else (0, 0, 0)
        if not (1 <= count <= MAX_IMAGES and min(width, height) >= 8 and max(width, height) <= MAX_SIDE):
            raise DataError(
                f"data.source 'synthetic:{argument[:40]}' names no images; write synthetic:COUNTxWIDTHxHEIGHT, for example "
                f"synthetic:1281167x500x375 (sides of 8 to {MAX_SIDE} pixels)"
            )
        return cls(count, width, height)

    @property
    def name(self) -> str:
        return f"synthetic:{self._count}x{self._width}x{self._height}"

    def __len__(self) -> int:
        return self._count

    def load(self, index: int) -> Tensor:
        """(3, height, width) uint8."""
        return decode_rgb(self._jpeg, self.sample_id(index))

    def sample_id(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]


def _jpeg(width: int, height: int) -> bytes:
    """Smooth colors with some noise, which compress about as photographs do."""
    gen = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 12, generator=gen)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
    noise = torch.randn(3, height, width, generator=gen)
    pixels = (255 * smooth + 8 * noise).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
