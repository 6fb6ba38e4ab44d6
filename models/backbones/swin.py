"""timm's SwinTransformer (v1) as a backbone that computes on visible tokens only: group window attention without a roll
(GreenMIM, papers.md 4.2).

Tables of relative positions are made for the nominal window and used as they are on smaller grids; a variant built for such
a grid has the part of them that is used there. Painted images are `dense.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from models.backbones.cuts import Span
from models.backbones.dense import BIAS_TABLE
from models.backbones.hierarchy import Hierarchy, LevelInfo
from models.backbones.visible_block import VisibleBlock
from models.level_plans import LevelNeed, LevelPlan
from models.masking import MaskPlan
from models.visible import linear_convolution, merge_patches, visible_patches, window_attention
from models.window_groups import Pair


class SwinBlock(VisibleBlock):
    """Layers of a Swin on visible tokens; named as in timm below `parts`."""

    def open_level(self, x: Tensor, level: int, plan: MaskPlan) -> Tensor:
        """See `VisibleBlock.open_level`: timm's patch embedding, or its patch merging."""
        if level:
            return merge_patches(self.part(f"layers.{level}.downsample"), x, self.scales[level - 1])
        embed = self.part("patch_embed")
        patches = visible_patches(x, plan, embed.patch_size[0])
        tokens: Tensor = embed.norm(linear_convolution(embed.proj, patches))
        return tokens

    def run_layer(self, x: Tensor, level: int, layer: int, plan: LevelPlan) -> Tensor:
        """See `VisibleBlock.run_layer`: timm's SwinTransformerBlock; every second one has its windows shifted."""
        module = self.part(f"layers.{level}.blocks.{layer}")
        groups = plan.groups[shift_of(layer, module.window_size)]
        table = module.attn.relative_position_bias_table
        x = x + window_attention(module.attn, module.norm1(x), groups, table)
        mixed: Tensor = x + module.mlp(module.norm2(x))
        return mixed


class SwinBackbone(Hierarchy):
    """A timm SwinTransformer on visible tokens; see `Hierarchy`."""

    block_class = SwinBlock
    # `always_partition` keeps windows and tables nominal on small grids; both leave timm's own forward pass unused.
    block_args: ClassVar[dict[str, Any]] = {"always_partition": True, "strict_img_size": False}
    variant_only: ClassVar[dict[str, Any]] = {"strict_img_size": False}
    per_level = ("depths", "num_heads", "head_dim", "window_size", "mlp_ratio")

    def read_levels(self, model: Any) -> tuple[LevelInfo, ...]:
        """See `Hierarchy.read_levels`."""
        return tuple(
            LevelInfo(
                layers=len(stage.blocks),
                width=info["num_chs"],
                stride=info["reduction"],
                window=tuple(stage.blocks[0].window_size),
            )
            for stage, info in zip(model.layers, model.feature_info, strict=True)
        )

    def need(self, span: Span, scale: int) -> LevelNeed:
        """See `Hierarchy.need`."""
        level = self.levels[span.level]
        assert level.window is not None
        shifts = dict.fromkeys(shift_of(layer, level.window) for layer in range(span.start, span.end))
        return LevelNeed(span.level, scale, level.width, level.window, tuple(shifts))

    def paths(self, span: Span) -> list[str]:
        """See `Hierarchy.paths`."""
        opening = [f"layers.{span.level}.downsample" if span.level else "patch_embed"]
        layers = [f"layers.{span.level}.blocks.{layer}" for layer in range(span.start, span.end)]
        return (opening if span.start == 0 else []) + layers

    def sizes_of_levels(self, layers: Sequence[int], grid: Pair) -> dict[str, Any]:
        """See `Hierarchy.sizes_of_levels`. Windows are nominal: timm makes those that are larger than a map smaller."""
        windows = [list(level.window or ()) for level in self.levels[: len(layers)]]
        return {"depths": list(layers), "window_size": windows}

    def fitted(self, trained: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """See `Hierarchy.fitted`: of each table, the differences of places that occur in the variant's window."""
        found = dict(trained)
        for number, stage in enumerate(model.layers):  # type: ignore[arg-type]
            for layer, module in enumerate(stage.blocks):
                key, nominal = f"layers.{number}.blocks.{layer}.attn.{BIAS_TABLE}", self.levels[number].window
                assert nominal is not None
                found[key] = inner_table(trained[key], nominal, tuple(module.window_size))
        return found


def inner_table(table: Tensor, window: Pair, smaller: Pair) -> Tensor:
    """((2 h - 1) (2 w - 1), heads) of an h x w window -> the same of a smaller window: differences keep their rows."""
    height, width = (2 * side - 1 for side in window)
    down, across = (outer - inner for outer, inner in zip(window, smaller, strict=True))
    whole = table.unflatten(0, (height, width))
    return whole[down : height - down, across : width - across].flatten(0, 1)


def shift_of(layer: int, window: Pair) -> Pair:
    """How far the windows of a level's layer are moved, as in timm: every second one by half a window."""
    return (window[0] // 2, window[1] // 2) if layer % 2 else (0, 0)
