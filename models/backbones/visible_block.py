"""A block of a hierarchical encoder on visible tokens: the sequence of its levels and layers.

Swin and Twins implement how a level is opened and a layer is run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bim.models.backbones.cuts import Span
from bim.models.backbones.level_modules import add_modules
from bim.models.masks.level_indices import LevelIndices, LevelRequirements, block_indices
from bim.models.masks.plan import MaskPlan


class VisibleBlock(nn.Module, ABC):
    """Spans of layers on visible tokens; the first block takes images, the others tokens of the previous block.

    parts: timm's modules by their paths. scales: tokens per side of a mask unit in each level. requirements: of the spans,
    see `block_indices`.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        spans: Sequence[Span],
        scales: Sequence[int],
        requirements: Sequence[LevelRequirements],
    ) -> None:
        super().__init__()
        self.parts = nn.Module()
        add_modules(self.parts, parts)
        self.spans = tuple(spans)
        self.scales = tuple(scales)
        self.requirements = tuple(requirements)

    def part(self, path: str) -> Any:
        """timm's module of that path."""
        return self.parts.get_submodule(path)

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: images (B, 3, H, W), or tokens (B, N', C') with at least the plan's units -> (B, V * s * s, C).

        Tokens are in the order of `plan.keep_tokens` in input and output. Missing `plan.encoder_indices` are computed.
        Raises ValueError if x does not fit the plan.
        """
        indices = plan.encoder_indices or block_indices(plan, self.requirements).to(x.device)
        levels: Mapping[int, LevelIndices] = indices.levels  # type: ignore[attr-defined]
        first = self.spans[0]
        if first.level or first.start:
            x = self.visible_tokens(x, plan, self.scales[first.level - (first.start == 0)])
        for span in self.spans:
            if span.start == 0:
                x = self.open_level(x, span.level, plan)
            for layer in range(span.start, span.end):
                x = self.run_layer(x, span.level, layer, levels[span.level])
        return x

    def visible_tokens(self, x: Tensor, plan: MaskPlan, scale: int) -> Tensor:
        """The tokens of the units that this block keeps, which come first: (B, units * scale^2, C) -> (B, V * scale^2, C).

        scale: tokens per side of a unit. Raises ValueError if `x` has another number of tokens than such units have.
        """
        per_unit = scale * scale
        units, rest = divmod(x.shape[1], per_unit)
        if rest or not plan.visible <= units <= plan.permutation.shape[1]:
            raise ValueError(
                f"{x.shape[1]} tokens are not {plan.visible} or more of the plan's {plan.grid[0]} x {plan.grid[1]} units of "
                f"{scale} x {scale} tokens"
            )
        return x[:, : plan.visible * per_unit]

    @abstractmethod
    def open_level(self, x: Tensor, level: int, plan: MaskPlan) -> Tensor:
        """(B, 3, H, W) for level 0, else the tokens of the previous level (B, T', C') -> tokens of that level (B, T, C)."""

    @abstractmethod
    def run_layer(self, x: Tensor, level: int, layer: int, indices: LevelIndices) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
