"""Swin's relative position bias tables, ((2 h - 1) (2 w - 1), heads) of an h x w window, for windows of other sizes."""

from __future__ import annotations

import math

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from bim.models.masks.window_groups import Pair

BIAS_TABLE = "relative_position_bias_table"
# Buffers that older versions of timm saved with a Swin; its sizes determine them.
DERIVED_BUFFERS = ("attn_mask", "relative_position_index", "relative_coords_table")


def can_resample(key: str, given: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Whether the tensor `key` of shape `given` is a bias table that `resampled` brings to the shape `needed`.

    Raises ValueError if it is one of a window that is not square.
    """
    if not key.endswith(BIAS_TABLE) or given[1:] != needed[1:]:
        return False
    if square_window(given[0]) is None or square_window(needed[0]) is None:
        raise ValueError(
            f"init_from: '{key}' has {given[0]} rows, the backbone needs {needed[0]}; a table of relative positions is "
            "resampled from one square window to another only: give weights of the same windows, or set window_size or "
            "img_size in backbone.model_args to theirs"
        )
    return True


def resampled(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A bias table of a square window, ((2 w - 1)^2, heads), for another one; a tensor of that shape is unchanged.

    Raises ValueError if one of two different windows is not square.
    """
    if tuple(table.shape) == shape:
        return table
    window = square_window(shape[0])
    if window is None or square_window(table.shape[0]) is None:
        raise ValueError(
            f"a table of relative positions of {table.shape[0]} rows cannot be resampled to {shape[0]} rows: both must be "
            "of square windows"
        )
    resized: Tensor = resize_rel_pos_bias_table(table, new_window_size=(window, window), new_bias_shape=shape)
    return resized


def square_window(rows: int) -> int | None:
    """The side of the square window whose bias table has so many rows, or None."""
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def inner_table(table: Tensor, window: Pair, smaller: Pair) -> Tensor:
    """The rows of the bias table of `window` whose differences of positions occur in a smaller window: its table.

    table: ((2 h - 1) (2 w - 1), heads) for a window of h x w tokens; that of the smaller window likewise.
    """
    return table[inner_rows(window, smaller)]


def with_inner_table(table: Tensor, inner: Tensor, window: Pair, smaller: Pair) -> Tensor:
    """A copy of the bias table of `window` with the table of a smaller window inside: the inverse of `inner_table`.

    Shapes as there.
    """
    return table.index_copy(0, inner_rows(window, smaller), inner.to(table))


def inner_rows(window: Pair, smaller: Pair) -> Tensor:
    """Indices of the rows that `inner_table` takes, in order."""
    height, width = (2 * side - 1 for side in window)
    down, across = (outer - inner for outer, inner in zip(window, smaller, strict=True))
    rows = torch.arange(height * width).unflatten(0, (height, width))
    return rows[down : height - down, across : width - across].flatten()
