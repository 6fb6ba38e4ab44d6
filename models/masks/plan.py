"""Mask plans: which mask units each block encodes and which tokens its decoder decodes, as index tensors.

A plan belongs to one block and one batch. The visible sets of the blocks are nested, and tokens travel in the order
in which they are dropped, so that a block boundary is a slice (BIM, arXiv 2311.17218).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bim.models.masks.sampling import SAMPLERS, complement, kept_count


class EncoderIndices(Protocol):
    """Index tensors that an encoder block derives from a plan alone, see `Backbone.prepare_plans`."""

    def to(self, device: torch.device | str) -> EncoderIndices:
        """The same with its indices on `device`."""
        ...


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """The units one block keeps and the tokens it decodes and throws, for a batch of B samples (int64 indices).

    Masks are drawn over U mask *units*. Where tokens are finer than units (early levels of a hierarchical encoder), a
    unit is a square of scale x scale tokens that are masked together; elsewhere units and tokens are the same.

    grid: (rows, columns) of units, U = rows * columns; units are numbered row by row.
    permutation: (B, U), the units in the order in which their tokens travel; the first `visible` are kept.
    visible: number of units that this block encodes.
    first_visible: number of units that the backbone's first block encodes (>= visible).
    decode: (B, Nd), masked *tokens* on `token_grid` that pass the decoder's layers, numbered row by row.
    thrown: (B, Nt), masked tokens that do not; Nd + Nt = (U - visible) * scale^2.
    scale: tokens per side of a unit.
    shared: whether all samples have the same indices, as with one mask per batch.
    encoder_indices: computed ahead of the step by `Backbone.prepare_plans`; None: the block computes what it needs.
    """

    grid: tuple[int, int]
    permutation: Tensor
    visible: int
    first_visible: int
    decode: Tensor
    thrown: Tensor
    scale: int = 1
    shared: bool = False
    encoder_indices: EncoderIndices | None = None

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of this block's tokens for a whole image."""
        return self.grid[0] * self.scale, self.grid[1] * self.scale

    @property
    def keep(self) -> Tensor:
        """(B, visible): the units this block encodes, in the order of their tokens."""
        return self.permutation[:, : self.visible]

    @property
    def keep_tokens(self) -> Tensor:
        """(B, visible * scale^2): the tokens of `keep` as they travel, unit after unit, row by row inside a unit."""
        return unit_tokens(self.keep, self.grid, self.scale)

    @property
    def masked(self) -> Tensor:
        """(B, Nd + Nt): all masked tokens, those decoded first, then those thrown."""
        return torch.cat([self.decode, self.thrown], dim=1)

    def unbatched_if_shared(self, indices: Tensor) -> Tensor:
        """(B, M) indices of this plan -> (1, M) where all samples share them, else unchanged."""
        return indices[:1] if self.shared else indices

    def newly_masked(self, tokens: Tensor) -> Tensor:
        """(B, M) tokens -> (B, M) bool, True where the backbone's first block encodes the token's unit.

        Attention mixed such units into the tokens that remain, so that predicting them is partly leaked.
        """
        rank = self.permutation.argsort(dim=1)  # the inverse permutation
        return rank.gather(1, token_units(tokens, self.grid, self.scale)) < self.first_visible

    def to(self, device: torch.device | str) -> MaskPlan:
        """The same plan with its indices on `device`."""
        return replace(
            self,
            permutation=self.permutation.to(device),
            decode=self.decode.to(device),
            thrown=self.thrown.to(device),
            encoder_indices=self.encoder_indices and self.encoder_indices.to(device),
        )


def visible_counts(units: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Number of visible `units` of each block: n_b = int(N (1 - r_b)), one ratio per block.

    Raises ValueError if a ratio lies outside (0, 1), if a later block masks less than an earlier one, or if a block has
    no visible or no masked unit.
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
                "block cannot see units that an earlier one dropped; set ratios that never decrease"
            )
    # The small term undoes the rounding of 1 - r: ten units at 0.9 leave one visible, not int(0.9999999999999998) = 0.
    counts = tuple(int(units * (1.0 - ratio) + 1e-9) for ratio in ratios)
    for block, (count, ratio) in enumerate(zip(counts, ratios, strict=True)):
        if count in (0, units):
            missing = "visible" if count == 0 else "masked"
            raise ValueError(
                f"mask.ratio {ratio} leaves block {block} no {missing} unit out of {units}; "
                f"{'lower' if count == 0 else 'raise'} the ratio or use a finer grid (larger image or smaller patch)"
            )
    return counts


def random_permutation(batch: int, units: int, gen: torch.Generator, per_batch: bool = False) -> Tensor:
    """(batch, units) int64: an independent uniform permutation per sample, by argsort of uniform noise as in MAE.

    per_batch: one permutation for all samples, as in GreenMIM.
    """
    noise = torch.rand(1 if per_batch else batch, units, generator=gen)
    return noise.argsort(dim=1, stable=True).repeat(batch if per_batch else 1, 1)


def unit_tokens(units: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """(B, M) units of `grid` -> (B, M * scale^2) tokens of a grid `scale` times as fine, unit after unit, row by row
    inside a unit."""
    if scale == 1:
        return units
    columns = grid[1] * scale
    inside = torch.arange(scale, device=units.device)
    corner = units // grid[1] * scale * columns + units % grid[1] * scale  # (B, M)
    square = inside.unsqueeze(1) * columns + inside  # (scale, scale)
    return (corner.unsqueeze(2) + square.flatten()).flatten(1)


def token_units(tokens: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """(B, M) tokens -> (B, M), the unit of `grid` that each lies in; the inverse of `unit_tokens`."""
    if scale == 1:
        return tokens
    columns = grid[1] * scale
    return tokens // columns // scale * grid[1] + tokens % columns // scale


def block_plans(
    permutation: Tensor,
    grid: tuple[int, int],
    visible: Sequence[int],
    scales: Sequence[int] | None = None,
    shared: bool = False,
) -> tuple[MaskPlan, ...]:
    """One plan per block over the same `permutation` (B, U): block b sees the first visible[b] units and decodes the
    tokens of all others.

    scales: tokens per side of a unit in each block's output; None: 1 everywhere. shared: all rows are equal.
    Raises ValueError if the grid does not hold U units, if the counts are not nested, or if the number of scales differs.
    """
    units = permutation.shape[1]
    if grid[0] * grid[1] != units:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} does not hold the {units} units of the permutation"
        )
    if (
        not visible
        or any(not 0 < count < units for count in visible)
        or list(visible) != sorted(visible, reverse=True)
    ):
        raise ValueError(
            f"visible counts {tuple(visible)} must lie between 0 and {units}, and never grow from block to block"
        )
    scales = (1,) * len(visible) if scales is None else tuple(scales)
    if len(scales) != len(visible) or min(scales) < 1:
        raise ValueError(
            f"scales {scales} of {len(visible)} blocks: give one per block, each a whole number from 1 up"
        )
    return tuple(
        MaskPlan(
            grid=grid,
            permutation=permutation,
            visible=count,
            first_visible=visible[0],
            decode=unit_tokens(permutation[:, count:], grid, scale),
            thrown=permutation[:, units:],
            scale=scale,
            shared=shared,
        )
        for count, scale in zip(visible, scales, strict=True)
    )


def partial_plan(plan: MaskPlan, throw_ratio: float, sampler: str, gen: torch.Generator) -> MaskPlan:
    """Divide the masked tokens of a plan into decoded and thrown ones (PR-MIM, arXiv 2411.15746), for every sample by
    itself, or once where all samples share their indices.

    throw_ratio: fraction of *all* tokens of the block that are thrown; 0 returns the plan and draws nothing.
    sampler: a name in `sampling.SAMPLERS`. gen: a CPU generator, whatever the plan's device.
    Raises ValueError if the sampler is unknown or the ratio leaves no masked token to the decoder.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"decoder.sampler is '{sampler}'; it must be one of {', '.join(SAMPLERS)}")
    if throw_ratio == 0:
        return plan
    tokens = plan.token_grid[0] * plan.token_grid[1]
    masked, visible = plan.unbatched_if_shared(plan.masked), plan.unbatched_if_shared(plan.keep_tokens)
    num_decoded = kept_count(tokens, visible.shape[1], throw_ratio)
    rank = random_permutation(masked.shape[0], tokens, gen).to(masked.device)
    decode = SAMPLERS[sampler](masked, visible, plan.token_grid, num_decoded, rank)
    thrown = complement(masked, decode, tokens)
    batch = plan.permutation.shape[0]
    return replace(plan, decode=decode.expand(batch, -1), thrown=thrown.expand(batch, -1))
