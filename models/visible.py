"""Operations of a hierarchical encoder on visible tokens with the parameters of timm's modules (GreenMIM, arXiv 2205.13515).

Tokens are (B, T, C) in the order of `MaskPlan.keep_tokens`: unit after unit, the s x s tokens of a unit row by row. Masked
tokens are neither computed nor stored. Units are whole squares of tokens, so no sparse convolution is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import WindowGroups, take
from bim.models.tokens import gather_tokens, patchify


def visible_patches(images: Tensor, plan: MaskPlan, patch: int) -> Tensor:
    """images: (B, 3, H, W) -> (B, V * s * s, patch * patch * 3), the patches of visible units, values in (row, column,
    channel) order. Raises ValueError if the image size does not match the plan's grid or is not divisible into patches."""
    height, width = images.shape[-2:]
    unit = height // plan.grid[0]
    if (height, width) != (plan.grid[0] * unit, plan.grid[1] * unit) or unit % patch:
        raise ValueError(
            f"images of {height} x {width} pixels do not match the plan's {plan.grid[0]} x {plan.grid[1]} units of patches "
            f"of {patch} pixels"
        )
    pixels = gather_tokens(patchify(images, unit), plan.keep)
    return merge_tokens(pixels.reshape(pixels.shape[0], -1, images.shape[1]), unit, patch)


def merge_tokens(x: Tensor, scale: int, side: int, columns_first: bool = False) -> Tensor:
    """(B, V * s * s, C) -> (B, V * (s / side)^2, side * side * C): concatenate squares of side x side tokens, unit after
    unit and row by row. columns_first: order of the tokens in a square, Swin's if set."""
    batch, tokens, channels = x.shape
    across = scale // side
    # (B, V, rows, side, columns, side, C)
    squares = x.reshape(batch, tokens // scale**2, across, side, across, side, channels)
    dims = (0, 1, 2, 4, 5, 3, 6) if columns_first else (0, 1, 2, 4, 3, 5, 6)
    return squares.permute(dims).reshape(batch, -1, side * side * channels)


def patch_linear(conv: nn.Conv2d, patches: Tensor) -> Tensor:
    """A convolution with stride equal to its kernel, as a linear map of patches: (B, N, p * p * C) -> (B, N, D)."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, p, p) -> (D, p * p * C)
    return F.linear(patches, weight, conv.bias)


def merge_patches(merging: Any, x: Tensor, scale: int) -> Tensor:
    """timm's Swin `PatchMerging` of (B, V * s * s, C) -> (B, V * (s / 2)^2, C')."""
    merged: Tensor = merging.reduction(merging.norm(merge_tokens(x, scale, 2, columns_first=True)))
    return merged


def window_attention(attention: Any, x: Tensor, groups: WindowGroups, table: Tensor | None = None) -> Tensor:
    """Attention of every token of x (B, T, C) to the visible tokens of its window -> (B, T, C).

    attention: has `qkv`, `proj` and `num_heads`. table: (rows, heads), the relative position bias table, or None.
    """
    heads = attention.num_heads
    qkv = attention.qkv(groups.group(x)).unflatten(1, (groups.count, groups.size))
    # (B, G, g, 3 * H * d) -> three of (B, G * H, g, d): fused kernels take four dimensions.
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
    if table is None:
        mask = (groups.bias_rows != groups.masked_row).unsqueeze(2).expand(-1, -1, heads, -1, -1)
    else:
        # The added last row masks pairs of different windows; every slot attends to itself, so that no row is all -inf.
        rows = torch.cat([table, table.new_full((1, heads), float("-inf"))])
        mask = F.embedding(groups.bias_rows, rows).permute(0, 1, 4, 2, 3).to(q.dtype)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(1, 2))
    heads_last = attended.unflatten(1, (groups.count, heads)).transpose(2, 3).flatten(3).flatten(1, 2)
    projected: Tensor = attention.proj(groups.restore(heads_last))
    return projected


def spatial_reduction_attention(attention: Any, x: Tensor, scale: int) -> Tensor:
    """timm's Twins `GlobalSubSampleAttn` of (B, V * s * s, C): keys are merged squares of visible tokens."""
    heads = attention.num_heads
    q = attention.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    if attention.sr is not None:
        x = attention.norm(patch_linear(attention.sr, merge_tokens(x, scale, attention.sr_ratio)))
    k, v = attention.kv(x).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    projected: Tensor = attention.proj(attended)
    return projected


def position_convolution(conv: nn.Conv2d, x: Tensor, halo: Tensor, scale: int) -> Tensor:
    """A depth-wise 3 x 3 convolution of (B, V * s * s, C) -> the same shape, masked tokens being zeros.

    halo: see `LevelIndices`. Each unit is convolved separately, with a border of one token.
    """
    batch, tokens, channels = x.shape
    bordered = take(torch.cat([x, x.new_zeros(batch, 1, channels)], dim=1), halo)
    side = scale + 2
    squares = bordered.reshape(-1, side, side, channels).permute(0, 3, 1, 2)
    convolved = F.conv2d(squares, conv.weight, conv.bias, groups=channels)  # (B * V, C, s, s)
    return convolved.permute(0, 2, 3, 1).reshape(batch, tokens, channels)
