"""Fixed positions of a ViT on another grid: MAE's sin-cos table is computed again, any other is resampled."""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from bim.models.tokens import sincos_positions

# Above the rounding of float32, and far below a change by training.
SAME_TABLE = 1e-5


def positions_on(positions: Tensor, prefix_rows: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, R + N, D) positions of the grid `old` -> (1, R + N', D) of the grid `new`, the R prefix rows unchanged.

    MAE's sin-cos table is computed for the new grid, so that coordinates have the same code at every size; learned
    positions are resampled (timm's bicubic).
    """
    if old == new:
        return positions
    prefix, table = positions[:, :prefix_rows], positions[0, prefix_rows:]
    width = table.shape[-1]
    if width % 4 == 0:
        sincos = sincos_positions(width, old).to(table)
        if torch.allclose(table, sincos, rtol=0, atol=SAME_TABLE):
            return torch.cat([prefix, sincos_positions(width, new).to(table)[None]], dim=1)
    resampled: Tensor = resample_abs_pos_embed(
        positions.float(), new_size=list(new), old_size=list(old), num_prefix_tokens=prefix_rows
    )
    return resampled.to(positions)
