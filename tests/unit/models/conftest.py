"""A ViT small enough for unit tests, and plans over its grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bim.models.backbones import ViTBackbone, open_backbone
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import generator

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}


@pytest.fixture
def tiny_args() -> dict[str, Any]:
    """Overrides that make vit_tiny_patch16_224 tiny: 4 layers of width 24 on 4 x 4 patches of 8 pixels."""
    return dict(TINY)


@pytest.fixture
def tiny_backbone() -> Callable[..., ViTBackbone]:
    """(blocks, name, encode, **overrides) -> a tiny backbone."""

    def build(
        blocks: Any = 2, name: str = "vit_tiny_patch16_224", encode: str = "auto", **overrides: Any
    ) -> ViTBackbone:
        backbone = open_backbone(name, blocks, TINY | overrides, encode)
        assert isinstance(backbone, ViTBackbone)
        return backbone

    return build


@pytest.fixture
def unmasked_plan() -> Callable[[int, tuple[int, int]], MaskPlan]:
    """(batch, grid) -> a plan that keeps every unit, in a shuffled order."""

    def build(batch: int, grid: tuple[int, int]) -> MaskPlan:
        units = grid[0] * grid[1]
        order = torch.rand(batch, units, generator=generator("unmasked")).argsort(dim=1)
        nothing = order[:, units:]
        return MaskPlan(grid, order, visible=units, first_visible=units, decode=nothing, thrown=nothing)

    return build


@pytest.fixture
def shake() -> Callable[[nn.Module], None]:
    """Moves every parameter, so that what is built as zeros or ones cannot hide a mistake."""

    def move(module: nn.Module) -> None:
        gen = generator("shake")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))

    return move
