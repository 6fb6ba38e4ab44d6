"""timm's Twins (SVT, and PCPVT) as a backbone that computes on visible tokens only (GreenMIM, papers.md 4.2).

Key and value reduction, a convolution whose stride is its kernel, is a linear map per cell of visible tokens; the depth-wise
position convolution sees zeros in place of masked tokens. It has no painted form: timm gives Twins no chain of levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.twins import LocallyGroupedAttn
from torch import Tensor

from bim.models.backbones.cuts import Span
from bim.models.backbones.hierarchy import Hierarchy, LevelInfo
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.masks.level_plans import LevelNeed, LevelPlan
from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import Pair
from bim.models.visible import (
    cells,
    linear_convolution,
    position_convolution,
    reduced_attention,
    visible_patches,
    window_attention,
)

UNSHIFTED = (0, 0)
SMALLEST_WINDOW = 2  # timm takes 1 for a global layer


class TwinsBlock(VisibleBlock):
    """Layers of a Twins on visible tokens; named as in timm below `parts`."""

    def open_level(self, x: Tensor, level: int, plan: MaskPlan) -> Tensor:
        """See `VisibleBlock.open_level`: timm's patch embeddings, of images and of tokens."""
        embed = self.part(f"patch_embeds.{level}")
        side = embed.patch_size[0]
        patches = cells(x, self.scales[level - 1], side) if level else visible_patches(x, plan, side)
        tokens: Tensor = embed.norm(linear_convolution(embed.proj, patches))
        return tokens

    def run_layer(self, x: Tensor, level: int, layer: int, plan: LevelPlan) -> Tensor:
        """See `VisibleBlock.run_layer`: timm's Block; positions come by convolution, after the first of a level."""
        module = self.part(f"blocks.{level}.{layer}")
        scale = self.scales[level]
        normed = module.norm1(x)
        if isinstance(module.attn, LocallyGroupedAttn):
            x = x + window_attention(module.attn, normed, plan.groups[UNSHIFTED])
        else:
            x = x + reduced_attention(module.attn, normed, scale)
        x = x + module.mlp(module.norm2(x))
        if layer == 0:
            assert plan.halo is not None
            conv = self.part(f"pos_block.{level}").proj[0]
            x = x + position_convolution(conv, x, plan.halo, scale)
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
        """See `Hierarchy.refusal`: keys must be made of whole cells of a unit."""
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

    def need(self, span: Span, scale: int) -> LevelNeed:
        """See `Hierarchy.need`. Layers with even numbers have windows, if any has."""
        level = self.levels[span.level]
        windowed = level.window is not None and span.start + span.start % 2 < span.end
        shifts = (UNSHIFTED,) if windowed else ()
        return LevelNeed(span.level, scale, level.width, level.window, shifts, halo=span.start == 0)

    def paths(self, span: Span) -> list[str]:
        """See `Hierarchy.paths`."""
        opening = [f"patch_embeds.{span.level}", f"pos_block.{span.level}"]
        layers = [f"blocks.{span.level}.{layer}" for layer in range(span.start, span.end)]
        return (opening if span.start == 0 else []) + layers

    def sizes_of_levels(self, layers: Sequence[int], grid: Pair) -> dict[str, Any]:
        """See `Hierarchy.sizes_of_levels`. A window larger than its map is made the map's size: timm would fill it up with
        empty tokens."""
        levels = self.levels[: len(layers)]
        sizes: dict[str, Any] = {
            "depths": list(layers),
            "embed_dims": [level.width for level in levels],
        }
        if any(level.window is not None for level in levels):
            stride = levels[0].stride
            windows = self.windows_at((grid[0] * stride, grid[1] * stride))[: len(levels)]
            sizes["wss"] = [window[0] if window else 1 for window in windows]
        return sizes

    def windows_at(self, size: Pair) -> list[Pair | None]:
        """See `Hierarchy.windows_at`: square ones."""
        sides = [
            level.window and max(SMALLEST_WINDOW, min(level.window[0], max(size) // level.stride))
            for level in self.levels
        ]
        return [(side, side) if side else None for side in sides]
