"""timm's pyramids (Swin, PVTv2, ConvNeXt, ResNet and others) cut into blocks of whole levels that encode all tokens.

Masked units are painted over in the image (SimMIM, FastMIM; papers.md 3.2), so every level computes on full maps and any
layer of timm's serves as it is. Cuts lie between levels; what cannot be cut there is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from bim.models.backbones.backbone import (
    BlockInfo,
    Usage,
    check_divisible,
    check_overrides,
    look_at,
    split_layers,
    too_few_blocks,
)
from bim.models.backbones.level_modules import PARTS, DenseBlock, LevelsOnly, PooledMap
from bim.models.backbones.levels import FAMILIES, Family, check_maps, take_apart
from bim.models.backbones.paint import Paint
from bim.models.backbones.pyramid_weights import check_fit, resized
from bim.models.backbones.weights import Weights, open_weights
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng

# Of a decoder's norm where timm's model has none whose place it could take: MAE's.
NORM_EPS = 1e-6


class DenseBackbone:
    """A timm pyramid as a `Backbone` that encodes all tokens.

    name: timm name. blocks: how many (levels are spread over them), or their sizes in layers, each ending where a level
    ends. model_args: keyword overrides of the timm model; `img_size` may be given for every family. encode: "auto" or
    "all". depths: layers up to the end of each level, where variants can be made.
    Raises ValueError for what cannot be cut, with the reason.
    """

    encode = "all"
    mask_per_batch_default = False

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        built = look_at(name, {})
        kind = type(built)
        parameters = inspect.signature(kind).parameters
        self.name = name
        self.model_args = dict(model_args)
        family = FAMILIES.get(kind.__name__, Family())
        # A class with sizes of its own takes them; for the others the size is only what the family is trained at.
        size = self.model_args.get("img_size", built.pretrained_cfg["input_size"][-2:])
        self.image_size: tuple[int, int] = image_size_of(size)
        own = {key: value for key, value in self.model_args.items() if key != "img_size"}
        sized = {"img_size": list(self.image_size)} if "img_size" in parameters else {}
        fixed = {"num_classes": 0, "drop_path_rate": 0.0, **family.fixed}
        self._args = own | sized | {key: value for key, value in fixed.items() if key in parameters}
        check_overrides(name, kind, own)
        pyramid = take_apart(name, self._args)
        if encode == "visible":
            raise ValueError(
                f"backbone '{name}' is timm's {kind.__name__}, whose windows and convolutions need every token; set "
                "mask.encode to all or auto"
            )
        self._pyramid = pyramid
        self._fits: set[tuple[int, int]] = set()
        levels = pyramid.levels
        self.unit: int = levels[-1].stride
        self.grid: tuple[int, int] = self.grid_at(self.image_size)
        self.mean: tuple[float, ...] = tuple(built.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(built.pretrained_cfg["std"])
        self.norm_eps: float = self._final_norm_eps()
        self.depths: tuple[int, ...] = tuple(
            sum(level.layers for level in levels[: count + 1]) for count in range(len(levels))
        )
        self._ends = split_levels(name, self.depths, blocks)
        starts = (0, *self._ends[:-1])
        self.blocks = tuple(
            BlockInfo(
                index=index,
                layers=sum(level.layers for level in levels[start:end]),
                depth=self.depths[end - 1],
                width=levels[end - 1].width,
                grid=(
                    self.image_size[0] // levels[end - 1].stride,
                    self.image_size[1] // levels[end - 1].stride,
                ),
                num_prefix_tokens=0,
                stride=levels[end - 1].stride,
            )
            for index, (start, end) in enumerate(zip(starts, self._ends, strict=True))
        )

    def prepared(self, plans: Mapping[int, MaskPlan], sweep: bool = False) -> dict[int, MaskPlan]:
        """See `Backbone.prepared`: the blocks need no more than the plans."""
        return dict(plans)

    def build_block(self, index: int, seed: int, init_from: str | None = None) -> DenseBlock:
        """See `Backbone.build_block`. The whole model is drawn as timm initialises it, and all but the block dropped."""
        with forked_rng(seed, "init", index):
            model = timm.create_model(self.name, pretrained=False, **self._args)
        block = self._block_of(model, index, Paint(self.unit, seed) if index == 0 else None)
        if init_from is not None:
            state = block.state_dict()
            weights = open_weights(init_from)
            shapes = self._check_fit(weights, block)
            tensors = {
                PARTS + key: resized(value, shapes[key]) for key, value in weights.take(shapes).items()
            }
            block.load_state_dict(state | tensors)
        return block

    def check_init_from(self, init_from: str) -> None:
        """See `Backbone.check_init_from`."""
        weights = open_weights(init_from)
        for info in self.blocks:
            block = self._block_of(look_at(self.name, self._args), info.index, None)
            self._check_fit(weights, block)

    def variant(
        self,
        depth: int,
        blocks: Sequence[Mapping[str, Tensor]],
        norm: Mapping[str, Tensor] | None,
        image_size: tuple[int, int] | None = None,
    ) -> nn.Module:
        """See `Backbone.variant`. An ordinary timm model where its class can be built with the levels up to `depth`.

        `norm` takes the place of its final norm if `depth` ends a block and the class has a final norm there (Swin, PVTv2;
        ConvNeXt at full depth); inside a block the width is another, and the level's own or a fresh norm stands there.
        ResNets, and ConvNeXts of fewer levels, have no norm: `norm` is left out. Every variant takes every size that
        `check_size` passes, and computes what the blocks do at it.
        """
        args = self.variant_args(depth, image_size)
        count = self.depths.index(depth) + 1
        needed = next(number for number, end in enumerate(self._ends, 1) if end >= count)
        if len(blocks) < needed:
            held = self.blocks[len(blocks) - 1].depth if blocks else 0
            raise too_few_blocks(len(blocks), held, depth)
        with forked_rng("variant"):
            model: nn.Module
            if self._plain(depth):
                model = timm.create_model(self.name, pretrained=False, **args)
            else:
                whole = timm.create_model(self.name, pretrained=False, **self._args)
                levels = self._pyramid.levels[:count]
                paths = [path for level in levels for path in level.parts]
                model = LevelsOnly(whole, paths, levels[-1].width, self._pyramid.channels_last)
        own = model.state_dict()
        trained = {
            key.removeprefix(PARTS): value
            for block in blocks
            for key, value in block.items()
            if key.startswith(PARTS)
        }
        state = {key: value for key, value in trained.items() if key in own}
        path = self._norm_path(depth)
        if path is not None:
            given = norm if norm is not None and count in self._ends else {}
            names = [key for key in own if key.startswith(path + ".")]
            # A level's own norm was trained with the block that opens with it or holds it.
            state = {key: own[key] for key in names} | state
            state |= {f"{path}.{key}": value for key, value in given.items()}
        model.load_state_dict(state)
        return model.eval()

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """See `Backbone.variant_args`; with `features_only` the model gives a list of one map."""
        if depth not in self.depths:
            raise ValueError(
                f"a variant of depth {depth} is asked of '{self.name}', whose levels end at "
                f"{', '.join(map(str, self.depths))} layers"
            )
        if image_size is not None:
            self.check_size(image_size)
        count = self.depths.index(depth) + 1
        levels, family = self._pyramid.levels, self._pyramid.family
        if not self._plain(depth):
            # Not strict: the weights of the levels that are left out are not there.
            only = {
                "features_only": True,
                "out_indices": [levels[count - 1].feature],
                "pretrained_strict": False,
            }
            return self._args | only
        if count == len(levels):
            return dict(self._args)
        args = {
            key: list(value)[:count]
            if key in family.per_level and isinstance(value, list | tuple) and len(value) == len(levels)
            else value
            for key, value in self._args.items()
        }
        return args | self._sizes_of_levels(count)

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Backbone.check_size`."""
        size = (size[0], size[1])
        if size in self._fits:
            return
        check_divisible(size, self.unit, f"the mask unit of '{self.name}', {self.unit} pixels a side")
        try:
            check_maps(self._pyramid, size)
        except ValueError as error:
            raise ValueError(
                f"'{self.name}' cannot take images of {size[0]} x {size[1]} pixels: {error}; set "
                "backbone.model_args.img_size and schedule.resolution to sizes that fit it"
            ) from error
        self._fits.add(size)

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Backbone.grid_at`."""
        self.check_size(size)
        return size[0] // self.unit, size[1] // self.unit

    def padded_levels(self, size: tuple[int, int]) -> list[int]:
        """See `Backbone.padded_levels`: variants pad as the blocks do."""
        self.check_size(size)
        return []

    def reopen(self, folder: Path, depth: int) -> nn.Module:
        """See `Backbone.reopen`."""
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return (model if self._plain(depth) else PooledMap(model, self._pyramid.channels_last)).eval()

    def usage(self, depth: int) -> Usage:
        """See `Backbone.usage`."""
        count = self.depths.index(depth) + 1
        normed = self._norm_path(depth) is not None
        trained = count in self._ends and normed
        if self._plain(depth):
            call = "model(x)"
            says = "the mean of the feature map over its places" + (
                ", after the final norm" if normed else ""
            )
            says += "; `model.forward_features` gives the map"
        else:
            call = (
                "model(x)[0].mean(dim=(1, 2))"
                if self._pyramid.channels_last
                else "model(x)[0].mean(dim=(2, 3))"
            )
            says = (
                "the mean over its places of the one feature map that `model(x)` gives in a list; the folder opens with "
                "`features_only`, since timm cannot build this model with fewer levels"
            )
        if not normed:
            says += ". The norm before the decoder has no place in this model and is left out"
        sizes = f"images may have any size that is a multiple of {self._pyramid.levels[count - 1].stride}"
        if any(key in self._args for key in ("window_size", "strict_img_size")):
            sizes += ", windows staying as they are"
        return Usage(call, says, sizes, self._pyramid.levels[count - 1].width, trained, self._plain(depth))

    def _check_fit(self, weights: Weights, block: DenseBlock) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's tensors by timm's names. Raises ValueError if `weights` lack them, or have others beside."""
        shapes = {
            key.removeprefix(PARTS): tuple(value.shape)
            for key, value in block.state_dict().items()
            if key.startswith(PARTS)
        }
        left_out = f"{block.chain[-1]}.{self._pyramid.family.level_norm}."
        check_fit(weights, shapes, block.chain, left_out)
        return shapes

    def _plain(self, depth: int) -> bool:
        """Whether timm's own class, with a head, can be the variant of that depth."""
        family = self._pyramid.family
        return family.truncates or (family.whole and depth == self.depths[-1])

    def _norm_path(self, depth: int) -> str | None:
        family = self._pyramid.family
        return family.norm.format(self.depths.index(depth)) if family.norm and self._plain(depth) else None

    def _final_norm_eps(self) -> float:
        if self._pyramid.norm_path is None:
            return NORM_EPS
        norm = self._pyramid.model.get_submodule(self._pyramid.norm_path)
        if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
            raise ValueError(
                f"backbone '{self.name}' cannot be cut into blocks: its final norm is a {type(norm).__name__}; a decoder's "
                "norm, which takes its place, is a LayerNorm"
            )
        return norm.eps

    def _sizes_of_levels(self, count: int) -> dict[str, Any]:
        """Keywords whose defaults in timm fit the whole model alone, for its first `count` levels."""
        levels = self._pyramid.levels[:count]
        sizes: dict[str, Any] = {"depths": [level.layers for level in levels]}
        if "embed_dims" in self._pyramid.family.per_level:
            sizes["embed_dims"] = [level.width for level in levels]
        if "window_size" in self._pyramid.family.per_level:
            stages = [self._pyramid.model.get_submodule(level.parts[-1]) for level in levels]
            sizes["window_size"] = [list(stage.blocks[0].window_size) for stage in stages]  # type: ignore
        return sizes

    def _block_of(self, model: nn.Module, index: int, paint: Paint | None) -> DenseBlock:
        """Take block `index` out of a whole model, which is spoilt by it."""
        levels, level_norm = self._pyramid.levels, self._pyramid.family.level_norm
        start = 0 if index == 0 else self._ends[index - 1]
        end = self._ends[index]
        parts = {path: model.get_submodule(path) for level in levels[start:end] for path in level.parts}
        opening = None
        if level_norm is not None:
            if start > 0:
                path = f"{levels[start - 1].parts[-1]}.{level_norm}"
                opening = (path, model.get_submodule(path))
            # The block gives the residual stream; this norm is trained where it is used, by what comes after.
            setattr(parts[levels[end - 1].parts[-1]], level_norm, nn.Identity())
        scale = 1 if index == 0 else self.unit // levels[start - 1].stride
        return DenseBlock(parts, self._pyramid.channels_last, scale, paint, opening)


def split_levels(name: str, depths: Sequence[int], blocks: int | Sequence[int]) -> tuple[int, ...]:
    """How many levels lie before the end of each block. `depths`: layers up to the end of each level.

    Raises ValueError if there are more blocks than levels, or the given layers per block do not end with levels.
    """
    if isinstance(blocks, int):
        if blocks > len(depths):
            raise ValueError(
                f"blocks is {blocks}, but '{name}' has only {len(depths)} levels between which it can be cut; ask for "
                f"{len(depths)} at most"
            )
        sizes = split_layers(len(depths), blocks)
        return tuple(sum(sizes[: index + 1]) for index in range(len(sizes)))
    layers = list(blocks)
    ends = [sum(layers[: index + 1]) for index in range(len(layers))]
    if not ends or ends[-1] != depths[-1] or any(size < 1 for size in layers) or not set(ends) <= set(depths):
        raise ValueError(
            f"blocks {layers} end after {', '.join(map(str, ends)) or 'no'} layers, but '{name}' can be cut only where a "
            f"level ends: after {', '.join(map(str, depths))} layers, the last of which must be reached"
        )
    return tuple(depths.index(end) + 1 for end in ends)


def image_size_of(size: Any) -> tuple[int, int]:
    """`img_size` as (height, width). Raises ValueError if it is neither a whole number nor two of them."""
    pair = [size, size] if isinstance(size, int) and not isinstance(size, bool) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(side) is not int for side in pair):
        raise ValueError(
            f"backbone.model_args: 'img_size' is {size!r}; it must be a whole number or [height, width]"
        )
    return pair[0], pair[1]
