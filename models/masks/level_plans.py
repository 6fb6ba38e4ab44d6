"""What the levels of a hierarchical encoder must know of a batch's mask: groups of windows, and neighbours for convolutions.

Worked out once per batch and block from the `MaskPlan` alone, on the CPU, so that it can be done ahead of the step; the
computation itself is in `visible.py`.
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
class LevelNeed:
    """What a block asks about one of its levels.

    level: its number in the backbone. scale: tokens per side of a mask unit there. width: C of its tokens. window: nominal
    (height, width), for which tables of relative positions are made; None: no windows. shifts: those that the block's
    layers use there. halo: whether a 3 x 3 convolution runs there.
    """

    level: int
    scale: int
    width: int
    window: Pair | None = None
    shifts: tuple[Pair, ...] = ()
    halo: bool = False


@dataclass(frozen=True, eq=False)
class LevelPlan:
    """The answer: groups by nominal shift, and for each visible unit its tokens with a border of one token.

    halo: (P, V * (s + 2)^2) int64, indices of visible tokens, T for those that are masked or outside; P as in
    `WindowGroups`.
    """

    groups: Mapping[Pair, WindowGroups] = field(default_factory=dict)
    halo: Tensor | None = None

    def to(self, device: torch.device | str) -> LevelPlan:
        """The same with its indices on `device`; groups that serve two shifts are moved once."""
        moved = {id(groups): groups.to(device) for groups in self.groups.values()}
        halo = None if self.halo is None else self.halo.to(device, non_blocking=True)
        return LevelPlan({shift: moved[id(groups)] for shift, groups in self.groups.items()}, halo)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The plans of a block's levels, by the levels' numbers: a `masking.Layout`."""

    levels: Mapping[int, LevelPlan]

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same with its indices on `device`."""
        return BlockPlan({level: plan.to(device) for level, plan in self.levels.items()})


def level_plans(
    plan: MaskPlan,
    needs: Sequence[LevelNeed],
    sweep: bool = False,
    shared: MutableMapping[Any, WindowGroups] | None = None,
) -> BlockPlan:
    """What a block with these `needs` must know of the batch, on the CPU.

    If all samples share their indices, one set of index tensors serves the batch; else every sample has its own, and the
    host's work grows with the batch. sweep: see `window_groups.swept_size`. shared: groups made before for this batch and
    `sweep`, by level, window and number of visible units, to be used again and added to.
    """
    shared = {} if shared is None else shared
    keep = plan.once(plan.keep).cpu()
    return BlockPlan({need.level: level_plan(keep, plan.grid, need, sweep, shared) for need in needs})


def level_plan(
    keep: Tensor,
    units: Pair,
    need: LevelNeed,
    sweep: bool = False,
    shared: MutableMapping[Any, WindowGroups] | None = None,
) -> LevelPlan:
    """keep: (P, V) visible units of the grid `units`, on the CPU, in the order of their tokens. shared: as in
    `level_plans`."""
    shared = {} if shared is None else shared
    grid = (units[0] * need.scale, units[1] * need.scale)
    rows, columns = np.divmod(unit_tokens(keep, units, need.scale).numpy(), grid[1])
    groups = {}
    for shift in need.shifts:
        assert need.window is not None
        real = window_on(grid, need.window, shift)
        key = (need.level, *real, keep.shape[1])
        if key not in shared:
            shared[key] = window_groups(
                rows, columns, *real, table=need.window, width=need.width, sweep=sweep
            )
        groups[shift] = shared[key]
    halo = halo_index(rows, columns, grid, need.scale) if need.halo else None
    return LevelPlan(groups, halo)


def halo_index(rows: np.ndarray, columns: np.ndarray, grid: Pair, scale: int) -> Tensor:
    """See `LevelPlan.halo`. rows, columns: (P, T) of visible tokens, unit after unit of scale x scale tokens."""
    samples, tokens = rows.shape
    where = np.full((samples, grid[0] + 2, grid[1] + 2), tokens, dtype=np.int64)
    where[np.arange(samples)[:, None], rows + 1, columns + 1] = np.arange(tokens)
    corners = slice(None, None, scale * scale)  # the first token of each unit
    around = np.arange(scale + 2)
    down = rows[:, corners, None, None] + around[:, None]  # (P, V, s + 2, 1)
    across = columns[:, corners, None, None] + around  # (P, V, 1, s + 2)
    found = where[np.arange(samples)[:, None, None, None], down, across]
    return torch.from_numpy(found.reshape(samples, -1))
