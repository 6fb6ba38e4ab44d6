"""Small Swins and Twins, and plans of what they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bim.models.backbones import SwinBackbone, TwinsBackbone, open_backbone
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.masks.plan import MaskPlan, block_plans, random_permutation
from bim.models.seeding import generator

Shake = Callable[[nn.Module], None]


Backbone = SwinBackbone | TwinsBackbone


# Levels of 2, 2, 4 and 2 layers, a mask unit of 32 pixels.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": [2, 2, 4, 2], "embed_dim": 8, "num_heads": [1, 2, 2, 4], "window_size": 4},
    ),
    "twins": (
        "twins_svt_small",
        {
            "depths": [2, 2, 4, 2],
            "embed_dims": [8, 12, 16, 24],
            "num_heads": [1, 2, 2, 4],
            "wss": [4, 4, 4, 4],
        },
    ),
    "twins without windows": (
        "twins_pcpvt_small",
        {"depths": [2, 2, 4, 2], "embed_dims": [8, 12, 16, 24], "num_heads": [1, 2, 2, 4]},
    ),
}


# Sizes at which timm pads no window: Twins has square ones only.
SIZES = [(family, (64, 64)) for family in TINY] + [("swin", (64, 128)), ("twins", (128, 256))]


def tiny(family: str, blocks: Any = 4, **overrides: Any) -> Backbone:
    name, args = TINY[family]
    backbone = open_backbone(name, blocks, {"img_size": 64} | args | overrides)
    assert isinstance(backbone, SwinBackbone | TwinsBackbone)
    return backbone


def images_of(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=generator("images", *size))


def plans_of(
    backbone: Backbone, size: tuple[int, int], visible: Any, batch: int = 2, per_batch: bool = True
) -> tuple[MaskPlan, ...]:
    """One plan per block; `visible` units in each, or one number for all. All units visible is allowed here."""
    grid = backbone.grid_at(size)
    units = grid[0] * grid[1]
    order = random_permutation(batch, units, generator("order"), per_batch)
    counts = [visible] * len(backbone.blocks) if isinstance(visible, int) else visible
    scales = [backbone.mask_unit_px // info.stride for info in backbone.blocks]
    plans = block_plans(order, grid, [min(count, units - 1) for count in counts], scales, per_batch)
    nothing = order[:, units:]
    return tuple(
        replace(plan, visible=units, first_visible=units, decode=nothing, thrown=nothing)
        if count == units
        else plan
        for plan, count in zip(plans, counts, strict=True)
    )


def built(backbone: Backbone, shake: Shake | None = None) -> list[VisibleBlock]:
    blocks = [backbone.build_block(index, seed=0) for index in range(len(backbone.blocks))]
    for block in blocks:
        if shake is not None:
            shake(block)
    return [block.eval() for block in blocks]


def chained(blocks: list[VisibleBlock], x: Tensor, plans: tuple[MaskPlan, ...]) -> list[Tensor]:
    tokens = [x]
    for block, plan in zip(blocks, plans, strict=True):
        tokens.append(block(tokens[-1], plan))
    return tokens[1:]


def as_tokens(feature: Tensor, width: int) -> Tensor:
    """What timm gives, (B, h, w, C) or (B, N, C), as (B, N, C)."""
    return feature.flatten(1, 2) if feature.ndim == 4 else feature
