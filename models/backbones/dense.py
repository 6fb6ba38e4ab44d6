"""timm's pyramids (Swin, PVTv2, ConvNeXt, ResNet and others) as backbones that encode all tokens, cut between levels.

A learned color fills masked units in the image (SimMIM, arXiv 2111.09886; FastMIM, arXiv 2212.06593), so that every level
computes full maps with timm's layers. Models that cannot be cut between levels are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone, Usage
from bim.models.backbones.bias_tables import DERIVED_BUFFERS, can_resample, resampled
from bim.models.backbones.cuts import AFTER_LEVELS, block_boundaries
from bim.models.backbones.level_modules import DenseBlock, LevelsOnly, PooledMap
from bim.models.backbones.levels import (
    FAMILIES,
    ArchitectureFamily,
    Pyramid,
    check_maps,
    decompose_levels,
    first_entries,
)
from bim.models.backbones.mask_fill import MaskFill
from bim.models.backbones.timm_models import build_on_meta, check_overrides, create_model, split_image_size
from bim.models.backbones.weights import Weights, check_fit

# Of the decoder's norm where timm's model has no final norm: MAE's.
NORM_EPS = 1e-6


class DenseBackbone(Backbone):
    """A timm pyramid that encodes all tokens.

    name: timm name. blocks: their number (levels are spread over them), or their sizes in layers, each ending with a level.
    model_args: keyword overrides of the timm model; every class accepts `img_size`. encode: "auto" or "all".
    depths: layers up to the end of each level. Raises ValueError, with the reason, for models that cannot be cut.
    """

    encode = "all"

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        built = build_on_meta(name, {})
        model_class = type(built)
        parameters = inspect.signature(model_class).parameters
        family = FAMILIES.get(model_class.__name__, ArchitectureFamily())
        # For classes without `img_size` it is only the size of the training.
        image_size, overrides = split_image_size(built, model_args)
        fixed = {
            "img_size": list(image_size),
            "num_classes": 0,
            "drop_path_rate": 0.0,
            **family.fixed,
        }
        self._args = overrides | {key: value for key, value in fixed.items() if key in parameters}
        check_overrides(name, model_class, overrides)
        self._pyramid = decompose_levels(name, self._args)
        if encode == "visible":
            raise ValueError(
                f"backbone '{name}' is timm's {model_class.__name__}, whose windows and convolutions need every token; set "
                "mask.encode to all or auto"
            )
        self._checked_sizes: set[tuple[int, int]] = set()
        levels = self._pyramid.levels
        super().__init__(
            name,
            model_args,
            built.pretrained_cfg,
            image_size,
            mask_unit_px=levels[-1].stride,
            norm_eps=final_norm_eps(name, self._pyramid),
        )
        self.depths = tuple(
            sum(level.layers for level in levels[: count + 1]) for count in range(len(levels))
        )
        boundaries = block_boundaries(name, [level.layers for level in levels], blocks, AFTER_LEVELS)
        # Number of levels up to the end of each block.
        self._ends = tuple(self.depths.index(end) + 1 for end in boundaries)
        self.blocks = tuple(
            self._block_info(index, end - start, end, levels[last - 1].width, levels[last - 1].stride)
            for index, ((start, end), last) in enumerate(
                zip(pairwise((0, *boundaries)), self._ends, strict=True)
            )
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Backbone.check_size`: the levels are run on the meta device, once per size."""
        size = (size[0], size[1])
        if size in self._checked_sizes:
            return
        super().check_size(size)
        try:
            check_maps(self._pyramid, size)
        except ValueError as error:
            raise ValueError(
                f"'{self.name}' cannot take images of {size[0]} x {size[1]} pixels: {error}; set "
                "backbone.model_args.img_size and schedule.resolution to sizes that fit it"
            ) from error
        self._checked_sizes.add(size)

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """See `Backbone.variant_args`; with `features_only` the model returns a list of one map."""
        self._check_depth(depth)
        if image_size is not None:
            self.check_size(image_size)
        levels, family = self._pyramid.levels, self._pyramid.family
        count = self._num_levels(depth)
        if not self._has_own_class(depth):
            # Not strict: the checkpoint lacks the weights of the other levels.
            return self._args | {
                "features_only": True,
                "out_indices": [levels[count - 1].feature],
                "pretrained_strict": False,
            }
        if count == len(levels):
            return dict(self._args)
        return first_entries(self._args, family.per_level, len(levels), count) | self._level_args(count)

    def load_exported(self, folder: Path, depth: int) -> nn.Module:
        """See `Backbone.load_exported`."""
        model = super().load_exported(folder, depth)
        return model if self._has_own_class(depth) else PooledMap(model, self._pyramid.channels_last).eval()

    def usage(self, depth: int) -> Usage:
        """See `Backbone.usage`."""
        has_norm, has_own_class = self._norm_path(depth) is not None, self._has_own_class(depth)
        if has_own_class:
            call = "model(x)"
            description = (
                f"the mean of the feature map{', after the final norm' if has_norm else ''}; `model.forward_features` gives "
                "the map"
            )
        else:
            call = f"model(x)[0].mean(dim={'(1, 2)' if self._pyramid.channels_last else '(2, 3)'})"
            description = (
                "the mean of the one feature map that `model(x)` returns in a list; the folder opens with `features_only`, "
                "since timm cannot build this model with fewer levels"
            )
        if not has_norm:
            description += ". The decoder's norm has no place in this model and is left out"
        level = self._pyramid.levels[self._num_levels(depth) - 1]
        sizes = f"images may have any size that is a multiple of {level.stride}"
        if any(key in self._args for key in ("window_size", "strict_img_size")):
            sizes += ", windows staying as they are"
        return Usage(call, description, sizes, level.width, self._has_trained_norm(depth), has_own_class)

    def from_checkpoint(self, weights: Weights, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Backbone.from_checkpoint`: bias tables are resampled to the windows."""
        return {key: resampled(value, tuple(drawn[key].shape)) for key, value in weights.take(drawn).items()}

    def _block_args(self, index: int) -> dict[str, Any]:
        """See `Backbone._block_args`: the whole model, of which all but the block is dropped."""
        return self._args

    def _extract_block(self, model: Any, index: int, seed: int) -> DenseBlock:
        levels, level_norm = self._pyramid.levels, self._pyramid.family.level_norm
        start, end = (0, *self._ends)[index : index + 2]
        parts = {path: model.get_submodule(path) for level in levels[start:end] for path in level.parts}
        opening = {}
        if level_norm is not None:
            if start > 0:
                path = f"{levels[start - 1].parts[-1]}.{level_norm}"
                opening[path] = model.get_submodule(path)
            # The block returns the residual stream; the next block applies and trains this norm.
            setattr(parts[levels[end - 1].parts[-1]], level_norm, nn.Identity())
        scale = 1 if index == 0 else self.mask_unit_px // levels[start - 1].stride
        mask_fill = MaskFill(self.mask_unit_px, seed) if index == 0 else None
        return DenseBlock(parts, self._pyramid.channels_last, scale, mask_fill, opening)

    def _check_weights(self, weights: Weights, block: Any, index: int, tensors: Mapping[str, Tensor]) -> None:
        level_norm = f"{block.chain[-1]}.{self._pyramid.family.level_norm}."
        check_fit(
            weights,
            {key: tuple(value.shape) for key, value in tensors.items()},
            block.chain,
            can_resize=can_resample,
            is_ignored=lambda key: key.startswith(level_norm) or key.endswith(DERIVED_BUFFERS),
        )

    def _new_variant(self, depth: int, args: Mapping[str, Any]) -> nn.Module:
        """timm's class where it can be built with the levels up to `depth`, else those levels of the whole model."""
        if self._has_own_class(depth):
            return super()._new_variant(depth, args)
        whole = create_model(self.name, **self._args)
        levels = self._pyramid.levels[: self._num_levels(depth)]
        paths = [path for level in levels for path in level.parts]
        return LevelsOnly(whole, paths, levels[-1].width, self._pyramid.channels_last)

    def _num_levels(self, depth: int) -> int:
        return self.depths.index(depth) + 1

    def _has_own_class(self, depth: int) -> bool:
        """Whether timm's class, with a head, can be the variant of that depth."""
        family = self._pyramid.family
        return family.truncates or (family.whole and depth == self.depths[-1])

    def _norm_path(self, depth: int) -> str | None:
        """See `Backbone._norm_path`: Swin, PVTv2, and ConvNeXt at full depth have a final norm."""
        norm = self._pyramid.family.norm
        return norm.format(self._num_levels(depth) - 1) if norm and self._has_own_class(depth) else None

    def _has_trained_norm(self, depth: int) -> bool:
        """See `Backbone._has_trained_norm`: inside a block the width is another."""
        return self._num_levels(depth) in self._ends and self._norm_path(depth) is not None

    def _level_args(self, count: int) -> dict[str, Any]:
        """Keywords of the first `count` levels whose defaults in timm fit the whole model only."""
        levels, per_level = self._pyramid.levels[:count], self._pyramid.family.per_level
        sizes: dict[str, Any] = {"depths": [level.layers for level in levels]}
        if "embed_dims" in per_level:
            sizes["embed_dims"] = [level.width for level in levels]
        if "window_size" in per_level:
            stages: list[Any] = [self._pyramid.model.get_submodule(level.parts[-1]) for level in levels]
            sizes["window_size"] = [list(stage.blocks[0].window_size) for stage in stages]
        return sizes


def final_norm_eps(name: str, pyramid: Pyramid) -> float:
    """eps of the final norm, or MAE's. Raises ValueError if a decoder's norm, a LayerNorm, cannot take its place."""
    if pyramid.norm_path is None:
        return NORM_EPS
    norm = pyramid.model.get_submodule(pyramid.norm_path)
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
        raise ValueError(
            f"backbone '{name}' cannot be cut into blocks: its final norm is a {type(norm).__name__}; a decoder's norm, "
            "which takes its place, is a LayerNorm"
        )
    return norm.eps
