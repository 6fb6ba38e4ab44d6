from __future__ import annotations

import torch

from bim.models.seeding import generator
from bim.models.targets import TARGETS
from bim.models.targets.pixels import PixelTarget
from bim.models.tokens import patchify


def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=generator("pixels"))


def test_normalized_pixels_follow_the_papers_formula() -> None:
    target = PixelTarget(4)(images())
    patches = patchify(images(), 4)
    deviation = patches - patches.sum(-1, keepdim=True) / 48
    variance = (deviation**2).sum(-1, keepdim=True) / 47
    torch.testing.assert_close(target, deviation / torch.sqrt(variance + 1e-6))


def test_plain_pixels_are_the_patches_themselves() -> None:
    assert torch.equal(PixelTarget(4, normalize=False)(images()), patchify(images(), 4))


def test_a_perfect_prediction_becomes_the_image_again() -> None:
    for normalize in (True, False):
        target = PixelTarget(4, normalize)
        torch.testing.assert_close(target.to_image(target(images()), images()), images())


def test_a_flat_patch_has_a_finite_target() -> None:
    assert PixelTarget(4)(torch.ones(1, 3, 4, 4)).abs().max() == 0


def test_the_table_builds_a_target_that_tells_its_width() -> None:
    target = TARGETS["pixels"](4, normalize=False)
    assert target(images()).shape == (2, 6, target.out_dim)
