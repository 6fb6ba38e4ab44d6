"""timm's SwinTransformer (v1) as a backbone that computes on visible tokens only: group window attention without a roll
(GreenMIM, papers.md 4.2).

Tables of relative positions are made for the nominal window and used as they are on smaller grids; a variant built for such
a grid has the part of them that is used there. Painted images are `dense.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bim.models.backbones.cuts import Span
from bim.models.backbones.hierarchy import Hierarchy, LevelInfo
from bim.models.backbones.pyramid_weights import BIAS_TABLE, resized
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.masks.level_plans import LevelNeed, LevelPlan
from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import Pair, table_rows, window_on
from bim.models.visible import linear_convolution, merge_patches, visible_patches, window_attention


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
        window = self._nominal(span.level)
        shifts = dict.fromkeys(shift_of(layer, window) for layer in range(span.start, span.end))
        return LevelNeed(span.level, scale, self.levels[span.level].width, window, tuple(shifts))

    def paths(self, span: Span) -> list[str]:
        """See `Hierarchy.paths`."""
        opening = [f"layers.{span.level}.downsample" if span.level else "patch_embed"]
        layers = [f"layers.{span.level}.blocks.{layer}" for layer in range(span.start, span.end)]
        return (opening if span.start == 0 else []) + layers

    def windows_at(self, size: Pair) -> list[Pair | None]:
        """See `Hierarchy.windows_at`."""
        return [self._window_at(level, size) for level in range(len(self.levels))]

    def sizes_of_levels(self, layers: Sequence[int], grid: Pair) -> dict[str, Any]:
        """See `Hierarchy.sizes_of_levels`. Windows are nominal: timm makes those that are larger than a map smaller."""
        windows = [list(level.window or ()) for level in self.levels[: len(layers)]]
        return {"depths": list(layers), "window_size": windows}

    def fitted(self, trained: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """See `Hierarchy.fitted`: of each table, the differences of places that occur in the variant's window."""
        found = dict(trained)
        for number, stage in enumerate(model.layers):  # type: ignore[arg-type]
            for layer, module in enumerate(stage.blocks):
                key = f"layers.{number}.blocks.{layer}.attn.{BIAS_TABLE}"
                found[key] = inner_table(trained[key], self._nominal(number), tuple(module.window_size))
        return found

    def received(self, given: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Hierarchy.received`: a table of the window that fits the level's map goes into the middle of the nominal one,
        whose other rows stay as drawn; one of another window is resampled."""
        found = dict(given)
        for key, (nominal, smaller) in self._tables(given).items():
            table = given[key]
            if nominal != smaller and len(table) == table_rows(smaller):
                found[key] = with_inner_table(drawn[key], table, nominal, smaller)
            else:
                found[key] = resized(table, tuple(drawn[key].shape))
        return found

    def clipped(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See `Hierarchy.clipped`: tables of windows that are larger than the map."""
        return {
            key: (table_rows(smaller), *shapes[key][1:]) for key, (_, smaller) in self._tables(shapes).items()
        }

    def _tables(self, keys: Iterable[str]) -> dict[str, tuple[Pair, Pair]]:
        """Those of timm's names that are tables -> the nominal window of their level, and the one that fits its map."""
        levels = {key: int(key.split(".")[1]) for key in keys if key.endswith(BIAS_TABLE)}
        return {
            key: (self._nominal(level), self._window_at(level, self.image_size))
            for key, level in levels.items()
        }

    def _nominal(self, level: int) -> Pair:
        window = self.levels[level].window
        assert window is not None
        return window

    def _window_at(self, level: int, size: Pair) -> Pair:
        stride = self.levels[level].stride
        return window_on((size[0] // stride, size[1] // stride), self._nominal(level), (0, 0))[0]


def inner_table(table: Tensor, window: Pair, smaller: Pair) -> Tensor:
    """((2 h - 1) (2 w - 1), heads) of an h x w window -> the same of a smaller window: differences keep their rows."""
    return table[inner_rows(window, smaller)]


def with_inner_table(table: Tensor, inner: Tensor, window: Pair, smaller: Pair) -> Tensor:
    """A copy of `table`, of `window`, in which the differences of places in a smaller window have the rows of `inner`: the
    inverse of `inner_table`."""
    return table.index_copy(0, inner_rows(window, smaller), inner.to(table))


def inner_rows(window: Pair, smaller: Pair) -> Tensor:
    """The rows of the table of `window`, ((2 h - 1) (2 w - 1),) in order, whose differences occur in a smaller window."""
    height, width = (2 * side - 1 for side in window)
    down, across = (outer - inner for outer, inner in zip(window, smaller, strict=True))
    rows = torch.arange(height * width).unflatten(0, (height, width))
    return rows[down : height - down, across : width - across].flatten()


def shift_of(layer: int, window: Pair) -> Pair:
    """How far the windows of a level's layer are moved, as in timm: every second one by half a window."""
    return (window[0] // 2, window[1] // 2) if layer % 2 else (0, 0)
