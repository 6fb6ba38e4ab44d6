"""Index tensors that the levels of a hierarchical encoder derive from a batch's mask: window groups and neighbors.

They depend on the `MaskPlan` alone and are computed on the CPU, once per batch and block, ahead of the step;
`visible.py` computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bim.models.masks.plan import MaskPlan, unit_tokens
from bim.models.masks.window_groups import Pair, WindowGroups, window_groups, window_on


@dataclass(frozen=True)
class LevelRequirements:
    """What the layers of a block need at one level.

    level: its number in the backbone. scale: tokens per side of a mask unit. width: C of the tokens. window: nominal
    (height, width), the window of the bias tables; None: no windows. shifts: of the windows of the block's layers.
    halo: whether a 3 x 3 convolution runs there.
    """

    level: int
    scale: int
    width: int
    window: Pair | None = None
    shifts: tuple[Pair, ...] = ()
    halo: bool = False


@dataclass(frozen=True, eq=False)
class LevelIndices:
    """Window groups by nominal shift, and for each visible unit its tokens with a border of one token.

    halo: (P, V * (s + 2)^2) int64, indices of visible tokens, T for tokens that are masked or outside; P as in
    `WindowGroups`.
    """

    groups: Mapping[Pair, WindowGroups] = field(default_factory=dict)
    halo: Tensor | None = None

    def to(self, device: torch.device | str) -> LevelIndices:
        """The same with its indices on `device`; groups that two shifts share are copied once."""
        moved = {id(groups): groups.to(device) for groups in self.groups.values()}
        halo = None if self.halo is None else self.halo.to(device)
        return LevelIndices({shift: moved[id(groups)] for shift, groups in self.groups.items()}, halo)


@dataclass(frozen=True, eq=False)
class BlockIndices:
    """The indices of a block's levels, by level number; `EncoderIndices` of hierarchical encoders."""

    levels: Mapping[int, LevelIndices]

    def to(self, device: torch.device | str) -> BlockIndices:
        """The same with its indices on `device`."""
        return BlockIndices({level: indices.to(device) for level, indices in self.levels.items()})


def block_indices(
    plan: MaskPlan,
    requirements: Sequence[LevelRequirements],
    sweep: bool = False,
    shared_groups: MutableMapping[Any, WindowGroups] | None = None,
) -> BlockIndices:
    """The indices of a block with these `requirements`, on the CPU.

    If all samples share their mask, one set of index tensors serves the batch; else the host's work grows with the batch.
    sweep: see `window_groups`. shared_groups: cache of groups for this batch and `sweep`, read and extended.
    """
    shared_groups = {} if shared_groups is None else shared_groups
    keep = plan.unbatched_if_shared(plan.keep).cpu()
    return BlockIndices(
        {level.level: level_indices(keep, plan.grid, level, sweep, shared_groups) for level in requirements}
    )


def level_indices(
    keep: Tensor,
    units: Pair,
    required: LevelRequirements,
    sweep: bool = False,
    shared_groups: MutableMapping[Any, WindowGroups] | None = None,
) -> LevelIndices:
    """keep: (P, V) visible units of the grid `units`, on the CPU. sweep, shared_groups: see `block_indices`."""
    shared_groups = {} if shared_groups is None else shared_groups
    grid = (units[0] * required.scale, units[1] * required.scale)
    rows, columns = np.divmod(unit_tokens(keep, units, required.scale).numpy(), grid[1])
    groups = {}
    for shift in required.shifts:
        assert required.window is not None
        window, real_shift = window_on(grid, required.window, shift)
        key = (required.level, window, real_shift, keep.shape[1])
        if key not in shared_groups:
            shared_groups[key] = window_groups(
                rows, columns, window, real_shift, required.window, required.width, sweep
            )
        groups[shift] = shared_groups[key]
    halo = halo_index(rows, columns, grid, required.scale) if required.halo else None
    return LevelIndices(groups, halo)


def halo_index(rows: np.ndarray, columns: np.ndarray, grid: Pair, scale: int) -> Tensor:
    """See `LevelIndices.halo`. rows, columns: (P, T) of visible tokens, unit after unit of scale x scale tokens."""
    samples, tokens = rows.shape
    token_at = np.full((samples, grid[0] + 2, grid[1] + 2), tokens, dtype=np.int64)
    token_at[np.arange(samples)[:, None], rows + 1, columns + 1] = np.arange(tokens)
    first_of_unit = slice(None, None, scale * scale)
    offsets = np.arange(scale + 2)
    down = rows[:, first_of_unit, None, None] + offsets[:, None]  # (P, V, s + 2, 1)
    across = columns[:, first_of_unit, None, None] + offsets  # (P, V, 1, s + 2)
    halo = token_at[np.arange(samples)[:, None, None, None], down, across]
    return torch.from_numpy(halo.reshape(samples, -1))
