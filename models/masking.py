"""Which mask units each block encodes and decodes: index tensors over a grid, never a boolean of unclear
polarity.

A plan belongs to one block and one batch. The visible sets of a family's blocks are nested, and tokens travel
in the order in which they will be dropped, so that crossing a boundary is a slice (BIM, papers.md 1.2). Knows
nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """What one block keeps, decodes and throws in one batch of B samples over a grid of N units (all int64
    indices).

    grid: (rows, columns) of units, N = rows * columns; units are numbered row by row.
    order: (B, N), the units in the order in which their tokens travel; the first `visible` are kept.
    visible: how many units this block encodes.
    first_visible: how many units the family's first block encodes (>= visible).
    decode: (B, Nd), masked units that the decoder really decodes.
    thrown: (B, Nt), masked units that are recovered without the decoder's layers; Nd + Nt = N - visible.
    """

    grid: tuple[int, int]
    order: Tensor
    visible: int
    first_visible: int
    decode: Tensor
    thrown: Tensor

    @property
    def keep(self) -> Tensor:
        """(B, visible): the units this block encodes, in the order of their tokens."""
        return self.order[:, : self.visible]

    @property
    def masked(self) -> Tensor:
        """(B, N - visible): all masked units, those decoded first, then those thrown."""
        return torch.cat([self.decode, self.thrown], dim=1)

    def newly_dropped(self, units: Tensor) -> Tensor:
        """(B, M) units -> (B, M) bool, True where the family's first block still saw the unit.

        Such units were mixed by attention into the tokens that survive, so predicting them is partly leaked.
        """
        rank = torch.empty_like(self.order)
        places = torch.arange(self.order.shape[1], device=self.order.device).expand_as(self.order)
        rank.scatter_(1, self.order, places)
        return rank.gather(1, units) < self.first_visible

    def to(self, device: torch.device | str) -> MaskPlan:
        """The same plan with its indices on `device`."""
        order, decode, thrown = (
            indices.to(device, non_blocking=True) for indices in (self.order, self.decode, self.thrown)
        )
        return replace(self, order=order, decode=decode, thrown=thrown)


def visible_counts(units: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """How many of `units` each block sees: n_b = int(N (1 - r_b)), one ratio per block.

    Raises ValueError if a ratio lies outside (0, 1), if a later block masks less than an earlier one (it
    cannot see tokens that were dropped before it), or if a block is left without a visible or without a
    masked unit.
    """
    if not ratios:
        raise ValueError("mask.ratio is an empty list; give one ratio for all blocks or one per block")
    for block, ratio in enumerate(ratios):
        if not 0.0 < ratio < 1.0:
            raise ValueError(
                f"mask.ratio of block {block} is {ratio}; it must lie between 0 and 1, both excluded"
            )
    for block in range(1, len(ratios)):
        if ratios[block] < ratios[block - 1]:
            raise ValueError(
                f"mask.ratio falls from {ratios[block - 1]} (block {block - 1}) to {ratios[block]} (block {block}); a later "
                "block cannot see what an earlier one dropped, so give ratios that never decrease"
            )
    # The small term undoes the rounding of 1 - r: ten units at 0.9 leave one visible, not int(0.9999999999999998).
    counts = tuple(int(units * (1.0 - ratio) + 1e-9) for ratio in ratios)
    for block, (count, ratio) in enumerate(zip(counts, ratios, strict=True)):
        if count in (0, units):
            missing = "visible" if count == 0 else "masked"
            raise ValueError(
                f"mask.ratio {ratio} leaves block {block} no {missing} unit out of {units}; "
                f"{'lower' if count == 0 else 'raise'} the ratio or use a finer grid (larger image or smaller patch)"
            )
    return counts


def random_order(batch: int, units: int, gen: torch.Generator) -> Tensor:
    """(batch, units) int64: an independent uniform permutation per sample, by argsort of uniform noise as in MAE."""
    return torch.rand(batch, units, generator=gen).argsort(dim=1, stable=True)


def block_plans(order: Tensor, grid: tuple[int, int], visible: Sequence[int]) -> tuple[MaskPlan, ...]:
    """One plan per block over the same `order` (B, N): block b sees the first visible[b] units and decodes
    all others.

    Raises ValueError if the grid does not hold N units or the counts are not nested.
    """
    units = order.shape[1]
    if grid[0] * grid[1] != units:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold the {units} units of the order")
    if (
        not visible
        or any(not 0 < count < units for count in visible)
        or list(visible) != sorted(visible, reverse=True)
    ):
        raise ValueError(
            f"visible counts {tuple(visible)} must lie between 0 and {units}, and never grow from block to block"
        )
    return tuple(
        MaskPlan(
            grid=grid,
            order=order,
            visible=count,
            first_visible=visible[0],
            decode=order[:, count:],
            thrown=order[:, units:],
        )
        for count in visible
    )
