"""Swin and Twins as backbones that compute on visible tokens only (GreenMIM, arXiv 2205.13515): what both share.

The modules that open a level, its patch embedding or merging, belong to it. A block holds timm's modules under timm's names,
so that weights come from and variants are plain timm models.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from torch import Tensor

from bim.models.backbones.backbone import Backbone, Usage
from bim.models.backbones.bias_tables import DERIVED_BUFFERS, can_resample
from bim.models.backbones.cuts import AFTER_LAYER_PAIRS, Span, block_boundaries, spans_between
from bim.models.backbones.levels import first_entries
from bim.models.backbones.timm_models import build_on_meta, check_overrides, split_image_size
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.backbones.weights import Weights, check_fit
from bim.models.masks.level_indices import LevelRequirements, block_indices
from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import Pair, WindowGroups

# Divisible by every sensible mask unit: timm builds the model, and the user's size is checked against the unit afterward.
PROBE_IMAGE_SIZE = 40320


@dataclass(frozen=True)
class LevelInfo:
    """One resolution of the backbone. stride: pixels per side of a token. window: nominal (height, width), or None."""

    layers: int
    width: int
    stride: int
    window: Pair | None


class Hierarchy(Backbone):
    """A timm Swin or Twins on visible tokens.

    name: timm name. blocks: their number (whole levels, then pieces of the longest one), or their sizes in layers.
    model_args: keyword overrides of the timm model. encode: "auto" or "visible". depths: every number of layers.
    Raises ValueError, with the reason, for models that cannot be cut.
    """

    encode = "visible"
    mask_per_batch_default = True
    block_class: ClassVar[type[VisibleBlock]]
    # Keywords that the project sets for blocks, which take every size, and for variants, which are plain timm models.
    block_args: ClassVar[dict[str, Any]] = {}
    variant_only_args: ClassVar[dict[str, Any]] = {}
    per_level: ClassVar[tuple[str, ...]]

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        built = build_on_meta(name, {})
        image_size, overrides = split_image_size(built, model_args)
        check_overrides(name, type(built), overrides)
        self._check_per_level(type(built), overrides)
        for key in overrides.keys() & self.block_args.keys():
            raise ValueError(
                f"backbone.model_args: '{key}' cannot be set where only visible tokens are encoded, since windows fit every "
                "grid there; leave it out"
            )
        fixed = {"num_classes": 0, "drop_path_rate": 0.0}
        self._args = overrides | {"img_size": list(image_size)} | fixed
        model = build_on_meta(name, overrides, img_size=PROBE_IMAGE_SIZE, **fixed, **self.block_args)
        reason = self.refusal(model)
        if reason:
            raise ValueError(f"backbone '{name}' cannot be cut into blocks: {reason}")
        self.levels = self.read_levels(model)
        mask_unit_px = self.levels[-1].stride
        super().__init__(
            name, model_args, built.pretrained_cfg, image_size, mask_unit_px, norm_eps=model.norm.eps
        )
        layers = [level.layers for level in self.levels]
        self._level_ends = tuple(accumulate(layers))
        self.depths = tuple(range(1, self._level_ends[-1] + 1))
        boundaries = (0, *block_boundaries(name, layers, blocks, AFTER_LAYER_PAIRS))
        self._spans = tuple(
            spans_between(self._level_ends, start, end) for start, end in pairwise(boundaries)
        )
        self.blocks = tuple(
            self._block_info(
                index,
                end - start,
                end,
                self.levels[spans[-1].level].width,
                self.levels[spans[-1].level].stride,
            )
            for index, ((start, end), spans) in enumerate(zip(pairwise(boundaries), self._spans, strict=True))
        )
        self._scales = tuple(mask_unit_px // level.stride for level in self.levels)
        self._requirements = tuple(
            tuple(self.requirements(span, self._scales[span.level]) for span in spans)
            for spans in self._spans
        )

    def _check_per_level(self, model_class: type, overrides: Mapping[str, Any]) -> None:
        """Raises ValueError for keywords of the levels that timm takes as lists only, and for levels without layers."""
        for key in self.per_level:
            default = inspect.signature(model_class).parameters[key].default
            if (
                key in overrides
                and isinstance(default, tuple)
                and not isinstance(overrides[key], list | tuple)
            ):
                raise ValueError(
                    f"backbone.model_args: '{key}' is {overrides[key]!r}; it must be a list with one value per level, such "
                    f"as {list(default)}"
                )
        depths = overrides.get("depths", ())
        if any(isinstance(layers, int) and layers < 1 for layers in depths):
            raise ValueError(
                f"backbone.model_args: 'depths' is {list(depths)}, where a level has no layer; give each at least 1, or "
                "fewer levels"
            )

    def refusal(self, model: Any) -> str | None:
        """The reason why this timm model cannot be cut, or None if it can."""
        return None

    @abstractmethod
    def read_levels(self, model: Any) -> tuple[LevelInfo, ...]:
        """The levels of the timm model."""

    @abstractmethod
    def requirements(self, span: Span, scale: int) -> LevelRequirements:
        """What the layers of the span need at their level."""

    @abstractmethod
    def paths(self, span: Span) -> list[str]:
        """Module paths in timm's model of the span."""

    @abstractmethod
    def windows_at(self, size: Pair) -> list[Pair | None]:
        """The window (height, width) of each level of a variant for images of `size`, None without windows."""

    @abstractmethod
    def level_args(self, layers: Sequence[int], image_size: Pair) -> dict[str, Any]:
        """timm's keywords for a model of the first levels with that many layers each."""

    def variant_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of a block's tensors, by timm's names, shapes that differ in a variant of the backbone's image size."""
        return {}

    def prepare_plans(self, plans: Mapping[int, MaskPlan], sweep: bool = False) -> dict[int, MaskPlan]:
        """See `Backbone.prepare_plans`: window groups, computed once for all blocks of a level, and neighbors."""
        shared_groups: dict[Any, WindowGroups] = {}
        return {
            index: replace(
                plan, encoder_indices=block_indices(plan, self._requirements[index], sweep, shared_groups)
            )
            for index, plan in plans.items()
        }

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """See `Backbone.variant_args`."""
        self._check_depth(depth)
        size = image_size or self.image_size
        self.check_size(size)
        layers = [span.end for span in spans_between(self._level_ends, 0, depth)]
        return (
            first_entries(self._args, self.per_level, len(self.levels), len(layers))
            | {"img_size": list(size), **self.variant_only_args}
            | self.level_args(layers, size)
        )

    def padded_levels(self, size: Pair) -> list[int]:
        """See `Backbone.padded_levels`."""
        self.check_size(size)
        return [
            number
            for number, (level, window) in enumerate(zip(self.levels, self.windows_at(size), strict=True))
            if window and any(side // level.stride % width for side, width in zip(size, window, strict=True))
        ]

    def usage(self, depth: int) -> Usage:
        """See `Backbone.usage`."""
        levels = self.levels[: self._level_at(depth) + 1]
        description = (
            "the mean of the feature map after the final norm; `model.forward_features` gives the map"
        )
        sizes = f"images may have any size that is a multiple of {levels[-1].stride}"
        if any(level.window for level in levels):
            sizes += (
                ", windows staying as they are at {size}; where a map is no multiple of its window, timm pads the border's "
                "windows with empty tokens, which pretraining on visible tokens never sees"
            )
        return Usage("model(x)", description, sizes, levels[-1].width, self._has_trained_norm(depth))

    def _block_args(self, index: int) -> dict[str, Any]:
        """See `Backbone._block_args`: the whole model, of which all but the block is dropped."""
        return self._args | self.block_args

    def _extract_block(self, model: Any, index: int, seed: int) -> VisibleBlock:
        paths = [path for span in self._spans[index] for path in self.paths(span)]
        parts = {path: model.get_submodule(path) for path in paths}
        return self.block_class(parts, self._spans[index], self._scales, self._requirements[index])

    def _check_weights(self, weights: Weights, block: Any, index: int, tensors: Mapping[str, Tensor]) -> None:
        spans = self._spans[index]
        # More layers in a level make another model; those after the last layer of the backbone do not.
        more = [
            Span(span.level, span.end, span.end + 1)
            for span in spans
            if span.end == self.levels[span.level].layers and span.level + 1 < len(self.levels)
        ]
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        variant_shapes = self.variant_shapes(shapes)
        check_fit(
            weights,
            shapes,
            [path for span in (*spans, *more) for path in self.paths(span)],
            can_resize=lambda key, given, needed: (
                given == variant_shapes.get(key) or can_resample(key, given, needed)
            ),
            is_ignored=lambda key: key.startswith("norm.") or key.endswith(DERIVED_BUFFERS),
        )

    def _has_trained_norm(self, depth: int) -> bool:
        """See `Backbone._has_trained_norm`: the last level of the block must be that of `depth`."""
        return self._level_at(depth) == self._level_at(self._block_at(depth).depth)

    def _level_at(self, depth: int) -> int:
        return spans_between(self._level_ends, 0, depth)[-1].level
