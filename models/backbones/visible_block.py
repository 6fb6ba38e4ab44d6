"""A block of a hierarchical encoder on visible tokens: the order of things, without what a level or a layer does.

Serves the families of `hierarchy.py`, each of which says how a level is opened and a layer run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bim.models.backbones.cuts import Span
from bim.models.backbones.level_modules import place
from bim.models.masks.level_plans import LevelNeed, LevelPlan, level_plans
from bim.models.masks.plan import MaskPlan


class VisibleBlock(nn.Module, ABC):
    """Spans of layers on visible tokens; the first block takes images, the others the tokens of the block before.

    parts: timm's modules by their paths. scales: tokens per side of a mask unit in each level, by its number. needs: what
    the spans must know of a plan; see `level_plans`.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        spans: Sequence[Span],
        scales: Sequence[int],
        needs: Sequence[LevelNeed],
    ) -> None:
        super().__init__()
        self.parts = nn.Module()
        for path, module in parts.items():
            place(self.parts, path, module)
        self.spans = tuple(spans)
        self.scales = tuple(scales)
        self.needs = tuple(needs)

    def part(self, path: str) -> Any:
        """timm's module of that name."""
        return self.parts.get_submodule(path)

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: images (B, 3, H, W), or tokens (B, N', C') with at least the plan's units -> (B, V * s * s, C).

        Tokens are in the order of `plan.keep_tokens` on both sides. Index tensors are those of `plan.layout`, or made here.
        Raises ValueError if x does not fit the plan.
        """
        layout = plan.layout or level_plans(plan, self.needs).to(x.device)
        first = self.spans[0]
        if first.level or first.start:
            x = self.kept(x, plan, self.scales[first.level - (first.start == 0)])
        for span in self.spans:
            if span.start == 0:
                x = self.open_level(x, span.level, plan)
            levels: Mapping[int, LevelPlan] = layout.levels  # type: ignore[attr-defined]
            for layer in range(span.start, span.end):
                x = self.run_layer(x, span.level, layer, levels[span.level])
        return x

    def kept(self, x: Tensor, plan: MaskPlan, scale: int) -> Tensor:
        """The tokens of the units that this block keeps: those that come first."""
        per_unit = scale * scale
        units, rest = divmod(x.shape[1], per_unit)
        if rest or not plan.visible <= units <= plan.order.shape[1]:
            raise ValueError(
                f"{x.shape[1]} tokens are not {plan.visible} or more of the plan's {plan.grid[0]} x {plan.grid[1]} units of "
                f"{scale} x {scale} tokens"
            )
        return x[:, : plan.visible * per_unit]

    @abstractmethod
    def open_level(self, x: Tensor, level: int, plan: MaskPlan) -> Tensor:
        """Images for level 0, else the tokens of the level before -> tokens of that level."""

    @abstractmethod
    def run_layer(self, x: Tensor, level: int, layer: int, plan: LevelPlan) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
