"""The 1,797 scanned digits that scikit-learn carries, as a source: real images that need no download.
For the demo and for tests: 8 x 8 pixels are a smoke test, not an evaluation."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from bim.orchestrator.data.fingerprint import computed_once


class DigitsSource:
    """1,797 gray digits, 8 x 8, ten classes. Values 0..16 are scaled to 0..255 and repeated to RGB."""

    name = "digits"
    fixed_splits: dict[str, np.ndarray] | None = None
    chunks = None
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # takes seconds to import; workers unpickle the arrays

        digits = load_digits()
        gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        self._images = np.repeat(gray[:, None], 3, axis=1)  # (1797, 3, 8, 8)
        self.labels: np.ndarray | None = digits.target.astype(np.int64)
        self.class_names: tuple[str, ...] | None = tuple(str(digit) for digit in range(10))

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Tensor:
        """-> (3, 8, 8) uint8."""
        return torch.from_numpy(self._images[index])

    def sample_id(self, index: int) -> str:
        return f"digit {index}"

    @computed_once
    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels, first 32 hexadecimal digits."""
        digest = hashlib.sha256(self._images.tobytes())
        assert self.labels is not None
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:32]
