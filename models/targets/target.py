"""What a prediction target is, for those who add one and those who use one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Target(Protocol):
    """An image -> what a decoder predicts for each of its tokens.

    out_dim: how many values belong to one token.
    start: (gain, bias) that make a new decoder's head begin near the target's own scale: its initial weights are multiplied
        by gain, its biases set to bias. (1, 0) suits values of mean 0 and deviation 1.
    """

    out_dim: int
    start: tuple[float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised float -> (B, N, out_dim), N tokens row by row."""
        ...

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """prediction: (B, N, out_dim), images: (B, 3, H, W) -> (B, 3, H, W) for a person to look at."""
        ...
