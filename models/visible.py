"""What a hierarchical encoder does to visible tokens: cutting images, merging, convolutions, attention (GreenMIM, papers.md
4.2), on the parameters of timm's own modules.

Tokens are (B, T, C) as `MaskPlan.keep_tokens` orders them: unit after unit, each unit's s x s tokens row by row. Masked
tokens are neither computed nor stored, and no sparse-convolution library is needed: units never end inside a cell.
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
    """images: (B, 3, H, W) -> (B, V * s * s, patch * patch * 3), the pixels of the patches of visible units, row, column,
    channel. Raises ValueError if the images do not hold the plan's units, or these no whole patches."""
    height, width = images.shape[-2:]
    unit = height // plan.grid[0]
    if (height, width) != (plan.grid[0] * unit, plan.grid[1] * unit) or unit % patch:
        raise ValueError(
            f"images of {height} x {width} pixels do not hold the plan's {plan.grid[0]} x {plan.grid[1]} units of patches "
            f"of {patch} pixels"
        )
    pixels = gather_tokens(patchify(images, unit), plan.keep)
    return cells(pixels.reshape(pixels.shape[0], -1, images.shape[1]), unit, patch)


def cells(x: Tensor, scale: int, side: int, columns_first: bool = False) -> Tensor:
    """(B, V * s * s, C) -> (B, V * (s / side)^2, side * side * C): squares of side x side tokens made one, still unit
    after unit and row by row. columns_first: the order of the tokens in a square, which is Swin's if set."""
    batch, tokens, channels = x.shape
    across = scale // side
    # (B, V, rows, side, columns, side, C)
    squares = x.reshape(batch, tokens // scale**2, across, side, across, side, channels)
    order = (0, 1, 2, 4, 5, 3, 6) if columns_first else (0, 1, 2, 4, 3, 5, 6)
    return squares.permute(order).reshape(batch, -1, side * side * channels)


def linear_convolution(conv: nn.Conv2d, patches: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, on (B, N, p * p * C) patches -> (B, N, D): a linear map of each."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, p, p) -> (D, p * p * C)
    return F.linear(patches, weight, conv.bias)


def merge_patches(merging: Any, x: Tensor, scale: int) -> Tensor:
    """timm's Swin `PatchMerging` of (B, V * s * s, C) -> (B, V * (s / 2)^2, C')."""
    merged: Tensor = merging.reduction(merging.norm(cells(x, scale, 2, columns_first=True)))
    return merged


def window_attention(attention: Any, x: Tensor, groups: WindowGroups, table: Tensor | None = None) -> Tensor:
    """Every token of x (B, T, C) attends to the visible tokens of its window -> (B, T, C).

    attention: has `qkv`, `proj` and `num_heads`. table: (rows, heads) of relative positions, if there is one.
    """
    heads = attention.num_heads
    qkv = attention.qkv(groups.group(x)).unflatten(1, (groups.count, groups.size))
    # (B, G, g, 3 * H * d) -> three of (B, G * H, g, d): four dimensions are what fused kernels take.
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
    if table is None:
        mask = (groups.pairs != groups.apart).unsqueeze(2).expand(-1, -1, heads, -1, -1)
    else:
        # The table's last row is for pairs that must not see each other; every slot sees itself, so that none is all of it.
        rows = torch.cat([table, table.new_full((1, heads), float("-inf"))])
        mask = F.embedding(groups.pairs, rows).permute(0, 1, 4, 2, 3).to(q.dtype)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(1, 2))
    together = seen.unflatten(1, (groups.count, heads)).transpose(2, 3).flatten(3).flatten(1, 2)
    projected: Tensor = attention.proj(groups.restore(together))
    return projected


def reduced_attention(attention: Any, x: Tensor, scale: int) -> Tensor:
    """timm's Twins `GlobalSubSampleAttn` of (B, V * s * s, C): every token attends to cells of visible tokens."""
    heads = attention.num_heads
    q = attention.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    if attention.sr is not None:
        x = attention.norm(linear_convolution(attention.sr, cells(x, scale, attention.sr_ratio)))
    k, v = attention.kv(x).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    projected: Tensor = attention.proj(seen)
    return projected


def position_convolution(conv: nn.Conv2d, x: Tensor, halo: Tensor, scale: int) -> Tensor:
    """A depth-wise 3 x 3 convolution of (B, V * s * s, C) -> the same shape, masked tokens counting as zeros.

    halo: as in `LevelPlan`. Each unit is convolved by itself with a border of one token around it.
    """
    batch, tokens, channels = x.shape
    bordered = take(torch.cat([x, x.new_zeros(batch, 1, channels)], dim=1), halo)
    side = scale + 2
    squares = bordered.reshape(-1, side, side, channels).permute(0, 3, 1, 2)
    convolved = F.conv2d(squares, conv.weight, conv.bias, groups=channels)  # (B * V, C, s, s)
    return convolved.permute(0, 2, 3, 1).reshape(batch, tokens, channels)
