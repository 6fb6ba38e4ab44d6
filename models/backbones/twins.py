"""timm's Twins (SVT and PCPVT) on visible tokens only.

Spatial reduction of keys and values, a convolution with stride equal to its kernel, is a linear map of squares of visible
tokens; masked tokens are zeros for the depth-wise position convolution. There is no Twins that encodes all tokens, since
timm does not give it as a chain of levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.twins import LocallyGroupedAttn
from torch import Tensor

from bim.models.backbones.cuts import Span
from bim.models.backbones.hierarchy import Hierarchy, LevelInfo
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.masks.level_indices import LevelIndices, LevelRequirements
from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import Pair
from bim.models.visible import (
    merge_tokens,
    patch_linear,
    position_convolution,
    spatial_reduction_attention,
    visible_patches,
    window_attention,
)

UNSHIFTED = (0, 0)
SMALLEST_WINDOW = 2  # timm builds a global layer for 1


class TwinsBlock(VisibleBlock):
    """Layers of a Twins on visible tokens; named as in timm below `parts`."""

    def open_level(self, x: Tensor, level: int, plan: MaskPlan) -> Tensor:
        """See `VisibleBlock.open_level`: timm's patch embeddings, of images and of tokens."""
        embed = self.part(f"patch_embeds.{level}")
        side = embed.patch_size[0]
        patches = merge_tokens(x, self.scales[level - 1], side) if level else visible_patches(x, plan, side)
        tokens: Tensor = embed.norm(patch_linear(embed.proj, patches))
        return tokens

    def run_layer(self, x: Tensor, level: int, layer: int, indices: LevelIndices) -> Tensor:
        """See `VisibleBlock.run_layer`: timm's Block, with the position convolution after the first of a level."""
        module = self.part(f"blocks.{level}.{layer}")
        scale = self.scales[level]
        normed = module.norm1(x)
        if isinstance(module.attn, LocallyGroupedAttn):
            x = x + window_attention(module.attn, normed, indices.groups[UNSHIFTED])
        else:
            x = x + spatial_reduction_attention(module.attn, normed, scale)
        x = x + module.mlp(module.norm2(x))
        if layer == 0:
            assert indices.halo is not None
            conv = self.part(f"pos_block.{level}").proj[0]
            x = x + position_convolution(conv, x, indices.halo, scale)
        return x


class TwinsBackbone(Hierarchy):
    """A timm Twins on visible tokens; see `Hierarchy`."""

    block_class = TwinsBlock
    per_level = ("depths", "embed_dims", "num_heads", "mlp_ratios", "sr_ratios", "wss")

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        if encode == "all":
            raise ValueError(
                f"backbone '{name}' is timm's Twins, which is trained here on visible tokens only; set mask.encode to "
                "visible or auto"
            )
        super().__init__(name, blocks, model_args, encode)

    def refusal(self, model: Any) -> str | None:
        """See `Hierarchy.refusal`: keys must be made of whole squares of a unit's tokens."""
        levels = self.read_levels(model)
        for level, layers in zip(levels, model.blocks, strict=True):
            scale = levels[-1].stride // level.stride
            for layer in layers:
                ratio = getattr(layer.attn, "sr_ratio", 1)
                if scale % ratio:
                    return (
                        f"keys at stride {level.stride} are reduced {ratio} times, which does not divide the {scale} tokens "
                        "along a mask unit there; change sr_ratios in backbone.model_args"
                    )
        return None

    def read_levels(self, model: Any) -> tuple[LevelInfo, ...]:
        """See `Hierarchy.read_levels`."""
        levels, stride = [], 1
        for embed, layers in zip(model.patch_embeds, model.blocks, strict=True):
            stride *= embed.patch_size[0]
            first = layers[0].attn
            window = (first.ws, first.ws) if isinstance(first, LocallyGroupedAttn) else None
            levels.append(LevelInfo(len(layers), embed.proj.out_channels, stride, window))
        return tuple(levels)

    def requirements(self, span: Span, scale: int) -> LevelRequirements:
        """See `Hierarchy.requirements`: layers with even numbers have windows, if any has."""
        level = self.levels[span.level]
        windowed = level.window is not None and span.start + span.start % 2 < span.end
        shifts = (UNSHIFTED,) if windowed else ()
        return LevelRequirements(span.level, scale, level.width, level.window, shifts, halo=span.start == 0)

    def paths(self, span: Span) -> list[str]:
        """See `Hierarchy.paths`."""
        opening = [f"patch_embeds.{span.level}", f"pos_block.{span.level}"]
        layers = [f"blocks.{span.level}.{layer}" for layer in range(span.start, span.end)]
        return (opening if span.start == 0 else []) + layers

    def level_args(self, layers: Sequence[int], image_size: Pair) -> dict[str, Any]:
        """See `Hierarchy.level_args`. A window larger than its map gets the size of the map, since timm pads it with empty
        tokens."""
        levels = self.levels[: len(layers)]
        sizes: dict[str, Any] = {"depths": list(layers), "embed_dims": [level.width for level in levels]}
        if any(level.window is not None for level in levels):
            windows = self.windows_at(image_size)[: len(levels)]
            sizes["wss"] = [window[0] if window else 1 for window in windows]
        return sizes

    def windows_at(self, size: Pair) -> list[Pair | None]:
        """See `Hierarchy.windows_at`: square ones."""
        sides = [
            level.window and max(SMALLEST_WINDOW, min(level.window[0], max(size) // level.stride))
            for level in self.levels
        ]
        return [(side, side) if side else None for side in sides]
