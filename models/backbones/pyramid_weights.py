"""Whether the weights of a file fit a pyramid's blocks, and the tables of relative positions that are resampled to fit.

Pure functions over names, shapes and tensors; serves `dense.py` and `hierarchy.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from bim.models.backbones.weights import Weights

BIAS_TABLE = "relative_position_bias_table"
# Buffers that older versions of timm saved with a Swin and that follow from its sizes.
DERIVED = ("attn_mask", "relative_position_index", "relative_coords_table")


def check_fit(
    weights: Weights,
    expected: Mapping[str, tuple[int, ...]],
    parts: Sequence[str],
    left_out: str,
    also: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Raises ValueError if the checkpoint lacks a tensor, has one of another shape, or parts that are unknown here.

    expected: shapes by timm's names. parts: module paths that belong to the block whole, but for the prefix `left_out`.
    Swin's tables of relative positions may be of another window, if both are square, or have the shape in `also`.
    """
    for key, shape in expected.items():
        found = weights.shapes.get(key)
        if found is None:
            raise ValueError(
                f"init_from: {weights.source} has no '{key}', which the backbone needs; "
                "check backbone.name and backbone.model_args"
            )
        if found in (shape, also.get(key)):
            continue
        if key.endswith(BIAS_TABLE) and found[1:] == shape[1:]:
            if square_window(found[0]) is None or square_window(shape[0]) is None:
                raise ValueError(
                    f"init_from: '{key}' of {weights.source} has {found[0]} rows, the backbone needs {shape[0]}; a table of "
                    "relative positions is resampled from one square window to another only: give weights of the same "
                    "windows, or set window_size or img_size in backbone.model_args to theirs"
                )
        else:
            raise ValueError(
                f"init_from: '{key}' of {weights.source} has shape {found}, the backbone needs {shape}; "
                "check backbone.name and backbone.model_args"
            )
    # A layer that is left behind in silence would make another model of the same weights.
    roots = tuple(f"{path}." for path in parts)
    unknown = [
        key
        for key in weights.shapes
        if key.startswith(roots)
        and key not in expected
        and not key.startswith(left_out)
        and not key.endswith(DERIVED)
    ]
    if unknown:
        raise ValueError(
            f"init_from: {weights.source} has '{unknown[0]}', which the backbone does not; its layers are of another kind"
        )


def resized(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A table of relative positions of a square window, ((2 w - 1)^2, heads), for another window; the rest as it is.

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
    fitted: Tensor = resize_rel_pos_bias_table(table, new_window_size=(window, window), new_bias_shape=shape)
    return fitted


def square_window(rows: int) -> int | None:
    """The side of the square window whose table of relative positions has so many rows; None: there is none."""
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None
