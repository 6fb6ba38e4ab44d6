"""A block of a Vision Transformer: timm's layers on visible tokens or on all, after a stem that embeds images.

Positions are fixed; they follow images of other sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bim.models.backbones.mask_fill import MaskFill, check_grid
from bim.models.backbones.positions import positions_on
from bim.models.masks.plan import MaskPlan
from bim.models.tokens import gather_tokens, patchify
from bim.models.visible import patch_linear


class ViTStem(nn.Module):
    """Images of any size -> the tokens that enter the first layer, for visible patches only; named as in timm.

    With `mask_fill` it embeds all patches, those of masked units in the learned color.
    positions: (1, N or P + N, D), a buffer: saved, never trained. Positions for grids of other image sizes are computed
    when they are first needed, and not saved.
    """

    pos_embed: Tensor

    def __init__(
        self, model: VisionTransformer, positions: Tensor, mask_fill: MaskFill | None = None
    ) -> None:
        super().__init__()
        self.patch_embed = model.patch_embed
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.num_prefix_tokens: int = model.num_prefix_tokens
        # Prefix tokens with a row of their own in the table of positions.
        self.prefix_rows: int = 0 if model.no_embed_class else model.num_prefix_tokens
        self.cls_token: nn.Parameter | None = model.cls_token
        self.reg_token: nn.Parameter | None = model.reg_token
        self.norm_pre = model.norm_pre
        self.paint = mask_fill  # the name in checkpoints
        self.register_buffer("pos_embed", positions)
        self._resampled_cache: dict[tuple[int, int], Tensor] = {}

    def forward(self, images: Tensor, plan: MaskPlan) -> Tensor:
        """images: (B, 3, H, W), plan over their N patches -> (B, P + Nv, D): prefix tokens, then visible patches.

        With a mask fill (B, P + N, D), all patches row by row. Raises ValueError if the plan's grid is not the images'.
        """
        check_grid(images, self.patch_size, plan)
        positions = self.positions(plan.grid)
        # The convolution's stride is its kernel: as a linear map per patch it takes visible patches alone.
        if self.paint is None:
            patches = gather_tokens(patchify(images, self.patch_size), plan.keep)  # (B, Nv, p * p * 3)
            patch_positions = positions[0, self.prefix_rows :][plan.keep]
        else:
            patches = patchify(self.paint(images, plan), self.patch_size)
            patch_positions = positions[:, self.prefix_rows :]
        x = self.patch_embed.norm(patch_linear(self.patch_embed.proj, patches)) + patch_positions

        prefix = [
            token.expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if prefix:
            tokens = torch.cat(prefix, dim=1)
            if self.prefix_rows:
                tokens = tokens + positions[:, : self.prefix_rows]
            x = torch.cat([tokens, x], dim=1)
        embedded: Tensor = self.norm_pre(x)
        return embedded

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, R + N, D), R prefix rows: the positions of a grid of patches; see `positions_on`."""
        if grid == self.grid:
            return self.pos_embed
        if grid not in self._resampled_cache:
            self._resampled_cache[grid] = positions_on(self.pos_embed, self.prefix_rows, self.grid, grid)
        return self._resampled_cache[grid]

    def _apply(self, fn: Any, recurse: bool = True) -> ViTStem:
        self._resampled_cache.clear()  # it depends on the buffer and its device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._resampled_cache.clear()
        super()._load_from_state_dict(*args, **kwargs)


class ViTBlock(nn.Module):
    """Consecutive timm layers; with a stem it takes images, else tokens of the previous block.

    encode: "visible", it drops the tokens that its plan does not keep; "all", it passes every token.
    """

    def __init__(
        self, layers: nn.Sequential, num_prefix_tokens: int, encode: str, stem: ViTStem | None = None
    ) -> None:
        super().__init__()
        self.stem = stem
        self.layers = layers
        self.num_prefix_tokens = num_prefix_tokens
        self.encode = encode

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: images (B, 3, H, W), or tokens (B, P + N', D) with N' >= Nv in plan order -> (B, P + Nv, D).

        With encode "all" tokens are (B, P + N, D), row by row, in input and output.
        """
        if self.stem is not None:
            x = self.stem(x, plan)
        elif self.encode == "visible":
            x = x[:, : self.num_prefix_tokens + plan.visible]
        encoded: Tensor = self.layers(x)
        return encoded
