"""The interface of prediction targets."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Target(Protocol):
    """An image -> the values that a decoder predicts for each of its tokens.

    out_dim: number of values per token.
    head_init: (gain, bias) that start a decoder's head near the scale of the target: its initial weights are multiplied
        by gain, its biases set to bias. (1, 0) suits values of mean 0 and standard deviation 1.
    """

    out_dim: int
    head_init: tuple[float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalized float -> (B, N, out_dim), N tokens row by row."""
        ...

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """prediction: (B, N, out_dim), images: (B, 3, H, W) -> (B, 3, H, W), a picture of the prediction."""
        ...
