"""How a backbone that encodes all tokens is told what is hidden: masked pixels are overwritten by one learned colour.

FastMIM's and SimMIM's way (papers.md 3.2). The colour is trained with the first block and is no part of what is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bim.models.initialization import TOKEN_STD
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng

# Where a first block keeps its paint; keys with it stay behind when a variant is made of the block.
PAINT = "paint."


class Paint(nn.Module):
    """One learned colour, (1, 3, 1, 1) on the scale of normalised images, laid over masked units of `unit` pixels a side."""

    def __init__(self, unit: int, seed: int) -> None:
        super().__init__()
        self.unit = unit
        with forked_rng(seed, "paint"):
            self.colour = nn.Parameter(torch.empty(1, 3, 1, 1).normal_(std=TOKEN_STD))

    def forward(self, images: Tensor, plan: MaskPlan) -> Tensor:
        """(B, 3, H, W) -> the same with the colour in place of every unit that `plan` does not keep.

        Raises ValueError if the images do not hold the plan's grid of units.
        """
        check_grid(images, self.unit, plan)
        keep = plan.keep
        is_kept = torch.zeros(plan.order.shape, dtype=torch.bool, device=images.device).scatter(1, keep, True)
        is_kept = is_kept.view(-1, 1, *plan.grid)
        pixels_kept = is_kept.repeat_interleave(self.unit, dim=2).repeat_interleave(self.unit, dim=3)
        return torch.where(pixels_kept, images, self.colour.to(images.dtype))


def check_grid(images: Tensor, unit: int, plan: MaskPlan) -> None:
    """Raises ValueError if images (B, 3, H, W) are not exactly the plan's grid of units."""
    height, width = images.shape[-2:]
    if (height, width) != (plan.grid[0] * unit, plan.grid[1] * unit):
        raise ValueError(
            f"images of {height} x {width} pixels do not hold the plan's {plan.grid[0]} x {plan.grid[1]} units of {unit} "
            f"pixels"
        )
