"""timm's SwinTransformer (v1) on visible tokens only: group window attention without a cyclic shift.

Bias tables have the size of the nominal window on every grid; a variant for a smaller grid gets the part that it uses.
`dense.py` is the Swin that encodes all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from bim.models.backbones.bias_tables import BIAS_TABLE, inner_table, resampled, with_inner_table
from bim.models.backbones.cuts import Span
from bim.models.backbones.hierarchy import Hierarchy, LevelInfo
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.backbones.weights import Weights
from bim.models.masks.level_indices import LevelIndices, LevelRequirements
from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import Pair, num_table_rows, window_on
from bim.models.visible import merge_patches, patch_linear, visible_patches, window_attention


class SwinBlock(VisibleBlock):
    """Layers of a Swin on visible tokens; named as in timm below `parts`."""

    def open_level(self, x: Tensor, level: int, plan: MaskPlan) -> Tensor:
        """See `VisibleBlock.open_level`: timm's patch embedding, or its patch merging."""
        if level:
            return merge_patches(self.part(f"layers.{level}.downsample"), x, self.scales[level - 1])
        embed = self.part("patch_embed")
        patches = visible_patches(x, plan, embed.patch_size[0])
        tokens: Tensor = embed.norm(patch_linear(embed.proj, patches))
        return tokens

    def run_layer(self, x: Tensor, level: int, layer: int, indices: LevelIndices) -> Tensor:
        """See `VisibleBlock.run_layer`: timm's SwinTransformerBlock, shifted in every second layer."""
        module = self.part(f"layers.{level}.blocks.{layer}")
        groups = indices.groups[shift_of(layer, module.window_size)]
        table = module.attn.relative_position_bias_table
        x = x + window_attention(module.attn, module.norm1(x), groups, table)
        mixed: Tensor = x + module.mlp(module.norm2(x))
        return mixed


class SwinBackbone(Hierarchy):
    """A timm SwinTransformer on visible tokens; see `Hierarchy`."""

    block_class = SwinBlock
    # `always_partition` keeps windows and tables nominal on small grids; timm's forward pass is not used.
    block_args: ClassVar[dict[str, Any]] = {"always_partition": True, "strict_img_size": False}
    variant_only_args: ClassVar[dict[str, Any]] = {"strict_img_size": False}
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

    def requirements(self, span: Span, scale: int) -> LevelRequirements:
        """See `Hierarchy.requirements`."""
        window = self._nominal(span.level)
        shifts = dict.fromkeys(shift_of(layer, window) for layer in range(span.start, span.end))
        return LevelRequirements(span.level, scale, self.levels[span.level].width, window, tuple(shifts))

    def paths(self, span: Span) -> list[str]:
        """See `Hierarchy.paths`."""
        opening = [f"layers.{span.level}.downsample" if span.level else "patch_embed"]
        layers = [f"layers.{span.level}.blocks.{layer}" for layer in range(span.start, span.end)]
        return (opening if span.start == 0 else []) + layers

    def windows_at(self, size: Pair) -> list[Pair | None]:
        """See `Hierarchy.windows_at`."""
        return [self._window_at(level, size) for level in range(len(self.levels))]

    def level_args(self, layers: Sequence[int], image_size: Pair) -> dict[str, Any]:
        """See `Hierarchy.level_args`. Windows are nominal: timm reduces those that are larger than a map."""
        windows = [list(level.window or ()) for level in self.levels[: len(layers)]]
        return {"depths": list(layers), "window_size": windows}

    def to_variant(self, trained: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """See `Backbone.to_variant`: of each bias table, the rows that the variant's window uses."""
        tables = {}
        for number, stage in enumerate(model.layers):
            for layer, module in enumerate(stage.blocks):
                key = f"layers.{number}.blocks.{layer}.attn.{BIAS_TABLE}"
                tables[key] = inner_table(trained[key], self._nominal(number), tuple(module.window_size))
        return trained | tables

    def from_checkpoint(self, weights: Weights, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Backbone.from_checkpoint`: the inverse of `to_variant`. A bias table of the window that fits the level's map
        goes into the drawn table of the nominal window; one of another window is resampled."""
        tensors = weights.take(drawn)
        for key, (nominal, smaller) in self._table_windows(drawn).items():
            table = tensors[key]
            if nominal != smaller and len(table) == num_table_rows(smaller):
                tensors[key] = with_inner_table(drawn[key], table, nominal, smaller)
            else:
                tensors[key] = resampled(table, tuple(drawn[key].shape))
        return tensors

    def variant_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See `Hierarchy.variant_shapes`: bias tables of windows that are larger than the map."""
        return {
            key: (num_table_rows(smaller), *shapes[key][1:])
            for key, (_, smaller) in self._table_windows(shapes).items()
        }

    def _table_windows(self, keys: Iterable[str]) -> dict[str, tuple[Pair, Pair]]:
        """timm's names of bias tables -> the nominal window of their level, and the one that fits its map."""
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


def shift_of(layer: int, window: Pair) -> Pair:
    """Shift of the windows in a level's layer, as in timm: half a window in every second layer."""
    return (window[0] // 2, window[1] // 2) if layer % 2 else (0, 0)
