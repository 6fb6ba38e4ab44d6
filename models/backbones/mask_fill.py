"""Masking for backbones that encode all tokens: one learned color replaces masked pixels.

As in SimMIM (arXiv 2111.09886) and FastMIM (arXiv 2212.06593). The color is trained with the first block and not exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bim.models.initialization import TOKEN_STD
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng

# The prefix of its key in a first block's state dict, which variants leave out.
MASK_FILL = "paint."


class MaskFill(nn.Module):
    """A learned color, (1, 3, 1, 1) on the scale of normalized images, for masked units of `mask_unit_px` per side.

    Checkpoints hold it as `colour`, a name that stays.
    """

    def __init__(self, mask_unit_px: int, seed: int) -> None:
        super().__init__()
        self.mask_unit_px = mask_unit_px
        with forked_rng(seed, "paint"):
            self.colour = nn.Parameter(torch.empty(1, 3, 1, 1).normal_(std=TOKEN_STD))

    def forward(self, images: Tensor, plan: MaskPlan) -> Tensor:
        """(B, 3, H, W) -> the same with the color in every unit that `plan` does not keep.

        Raises ValueError if the image size does not match the plan's grid of units.
        """
        check_grid(images, self.mask_unit_px, plan)
        is_kept = torch.zeros(plan.permutation.shape, dtype=torch.bool, device=images.device)
        is_kept = is_kept.scatter_(1, plan.keep, True).view(-1, 1, *plan.grid)
        is_kept = is_kept.repeat_interleave(self.mask_unit_px, dim=2).repeat_interleave(
            self.mask_unit_px, dim=3
        )
        return torch.where(is_kept, images, self.colour.to(images.dtype))


def check_grid(images: Tensor, mask_unit_px: int, plan: MaskPlan) -> None:
    """Raises ValueError if images (B, 3, H, W) are not exactly the plan's grid of units."""
    height, width = images.shape[-2:]
    if (height, width) != (plan.grid[0] * mask_unit_px, plan.grid[1] * mask_unit_px):
        raise ValueError(
            f"images of {height} x {width} pixels do not match the plan's {plan.grid[0]} x {plan.grid[1]} units of "
            f"{mask_unit_px} pixels"
        )
