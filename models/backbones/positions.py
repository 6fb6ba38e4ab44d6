"""Fixed positions of a ViT on another grid than their own: MAE's sin-cos table made anew, any other resampled."""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from bim.models.tokens import sincos_positions

# Within the rounding of float32, and far below what training would move.
SAME_TABLE = 1e-5


def positions_on(positions: Tensor, prefix_rows: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, R + N, D) positions of the grid `old` -> (1, R + N', D) of the grid `new`, the R prefix rows as they are.

    A table that is MAE's sin-cos one is computed for the new grid, so that positions mean the same at every size;
    learned ones are resampled (timm's bicubic).
    """
    if old == new:
        return positions
    prefix, table = positions[:, :prefix_rows], positions[0, prefix_rows:]
    width = table.shape[-1]
    if width % 4 == 0:
        own = sincos_positions(width, old).to(table)
        if torch.allclose(table, own, rtol=0, atol=SAME_TABLE):
            return torch.cat([prefix, sincos_positions(width, new).to(table)[None]], dim=1)
    resampled: Tensor = resample_abs_pos_embed(
        positions.float(), new_size=list(new), old_size=list(old), num_prefix_tokens=prefix_rows
    )
    return resampled.to(positions)
