"""What Swin and Twins share as backbones that compute on visible tokens only: levels, cuts, plans, weights and variants.

What opens a level, its merge, belongs to it. A block holds timm's own modules by timm's own names, so that weights come in
and variants go out as plain timm.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import timm
from torch import Tensor, nn

from bim.models.backbones.backbone import (
    BlockInfo,
    Usage,
    check_divisible,
    check_overrides,
    look_at,
    too_few_blocks,
)
from bim.models.backbones.cuts import Span, cut, spans_between
from bim.models.backbones.dense import image_size_of
from bim.models.backbones.level_modules import PARTS
from bim.models.backbones.pyramid_weights import check_fit
from bim.models.backbones.visible_block import VisibleBlock
from bim.models.backbones.weights import Weights, open_weights
from bim.models.masks.level_plans import LevelNeed, level_plans
from bim.models.masks.plan import MaskPlan
from bim.models.masks.window_groups import Pair, WindowGroups
from bim.models.seeding import forked_rng

# Every sensible mask unit divides it, so that timm builds the model and the user's own size can be checked against the unit.
SIZE_TO_LOOK_AT = 40320


@dataclass(frozen=True)
class LevelInfo:
    """One resolution of the backbone. stride: pixels per side of a token. window: nominal (height, width); None: there are
    none."""

    layers: int
    width: int
    stride: int
    window: Pair | None


class Hierarchy(ABC):
    """A timm Swin or Twins as a `Backbone` on visible tokens.

    name: timm name. blocks: how many (one or more levels each; beyond that the longest level is cut too), or their sizes in
    layers. model_args: keyword overrides of the timm model. encode: "auto" or "visible". depths: every number of layers.
    Raises ValueError for what cannot be cut, with the reason.
    """

    encode = "visible"
    mask_per_batch_default = True
    block_class: ClassVar[type[VisibleBlock]]
    # The project's own keywords for blocks, which take every size, and for variants, which are plain timm.
    block_args: ClassVar[dict[str, Any]] = {}
    variant_only: ClassVar[dict[str, Any]] = {}
    per_level: ClassVar[tuple[str, ...]]

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        built = look_at(name, {})
        self.name = name
        self.model_args = dict(model_args)
        own = {key: value for key, value in self.model_args.items() if key != "img_size"}
        check_overrides(name, type(built), own)
        self._check_per_level(type(built), own)
        for key in own.keys() & self.block_args.keys():
            raise ValueError(
                f"backbone.model_args: '{key}' cannot be set where visible tokens alone are encoded, since windows fit "
                "every grid there; leave it out"
            )
        size = self.model_args.get("img_size", built.pretrained_cfg["input_size"][-2:])
        self.image_size: tuple[int, int] = image_size_of(size)
        fixed = {"num_classes": 0, "drop_path_rate": 0.0}
        self._args = own | {"img_size": list(self.image_size)} | fixed
        model = look_at(name, own, img_size=SIZE_TO_LOOK_AT, **fixed, **self.block_args)
        reason = self.refusal(model)
        if reason:
            raise ValueError(f"backbone '{name}' cannot be cut into blocks: {reason}")
        self.levels = self.read_levels(model)
        self.unit: int = self.levels[-1].stride
        self.grid: tuple[int, int] = self.grid_at(self.image_size)
        self.mean: tuple[float, ...] = tuple(built.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(built.pretrained_cfg["std"])
        self.norm_eps: float = model.norm.eps
        self._ends = tuple(accumulate(level.layers for level in self.levels))
        self.depths: tuple[int, ...] = tuple(range(1, self._ends[-1] + 1))
        ends = cut(name, [level.layers for level in self.levels], blocks)
        starts = (0, *ends[:-1])
        self._spans = tuple(
            spans_between(self._ends, start, end) for start, end in zip(starts, ends, strict=True)
        )
        self.blocks = tuple(
            self._info(index, start, end) for index, (start, end) in enumerate(zip(starts, ends, strict=True))
        )
        self._scales = tuple(self.unit // level.stride for level in self.levels)
        self._needs = tuple(
            tuple(self.need(span, self._scales[span.level]) for span in spans) for spans in self._spans
        )

    def _check_per_level(self, model_class: type, own: Mapping[str, Any]) -> None:
        """Raises ValueError, in words better than timm's, for keywords of the levels that it takes as lists alone, and for
        levels without layers."""
        for key in self.per_level:
            usual = inspect.signature(model_class).parameters[key].default
            if key in own and isinstance(usual, tuple) and not isinstance(own[key], list | tuple):
                raise ValueError(
                    f"backbone.model_args: '{key}' is {own[key]!r}; it must be a list with one value per level, such as "
                    f"{list(usual)}"
                )
        if any(isinstance(layers, int) and layers < 1 for layers in own.get("depths", ())):
            raise ValueError(
                f"backbone.model_args: 'depths' is {list(own['depths'])}, where a level has no layer; give each at least 1, "
                "or fewer levels"
            )

    def refusal(self, model: Any) -> str | None:
        """Why this timm model cannot be cut, or None if it can."""
        return None

    @abstractmethod
    def read_levels(self, model: Any) -> tuple[LevelInfo, ...]:
        """The levels of the timm model."""

    @abstractmethod
    def need(self, span: Span, scale: int) -> LevelNeed:
        """What a block must know of a level to run these layers."""

    @abstractmethod
    def paths(self, span: Span) -> list[str]:
        """Module paths in timm's model of what the span runs."""

    @abstractmethod
    def windows_at(self, size: Pair) -> list[Pair | None]:
        """The window (height, width) that each level of a variant for images of `size` has; None: there are none."""

    @abstractmethod
    def sizes_of_levels(self, layers: Sequence[int], grid: Pair) -> dict[str, Any]:
        """timm's keywords for a model of the first levels with that many layers each; grid: of level 0's tokens."""

    def fitted(self, trained: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The blocks' tensors by timm's names as `model`, a variant, takes them: its windows may be smaller."""
        return trained

    def received(self, given: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of weights, by timm's names, as a block takes them: the inverse of `fitted`. drawn: its own."""
        return given

    def clipped(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of a block's tensors, the shapes that differ in a variant of the backbone's image size, by timm's names."""
        return {}

    def prepared(self, plans: Mapping[int, MaskPlan], sweep: bool = False) -> dict[int, MaskPlan]:
        """See `Backbone.prepared`: with groups of windows, made once for all blocks of a level, and neighbours."""
        shared: dict[Any, WindowGroups] = {}
        return {
            index: replace(plan, layout=level_plans(plan, self._needs[index], sweep, shared))
            for index, plan in plans.items()
        }

    def build_block(self, index: int, seed: int, init_from: str | None = None) -> VisibleBlock:
        """See `Backbone.build_block`. The whole model is drawn as timm initialises it, and all but the block dropped."""
        with forked_rng(seed, "init", index):
            model = timm.create_model(self.name, pretrained=False, **self._args, **self.block_args)
        block = self._block_of(model, index)
        if init_from is not None:
            weights = open_weights(init_from)
            shapes = self._check_fit(weights, block)
            drawn = {key.removeprefix(PARTS): value for key, value in block.state_dict().items()}
            tensors = self.received(weights.take(shapes), drawn)
            block.load_state_dict({PARTS + key: value for key, value in tensors.items()})
        return block

    def check_init_from(self, init_from: str) -> None:
        """See `Backbone.check_init_from`."""
        weights = open_weights(init_from)
        for index in range(len(self.blocks)):
            block = self._block_of(look_at(self.name, self._args | self.block_args), index)
            self._check_fit(weights, block)

    def variant(
        self,
        depth: int,
        blocks: Sequence[Mapping[str, Tensor]],
        norm: Mapping[str, Tensor] | None,
        image_size: tuple[int, int] | None = None,
    ) -> nn.Module:
        """See `Backbone.variant`: timm's own class with fewer levels and layers, in evaluation mode.

        `norm` becomes its final norm if `depth` lies in the level that ends the block, whose width it has; else a fresh one
        stands there.
        """
        args = self.variant_args(depth, image_size)
        holder = self._block_at(depth)
        if len(blocks) <= holder.index:
            held = self.blocks[len(blocks) - 1].depth if blocks else 0
            raise too_few_blocks(len(blocks), held, depth)
        with forked_rng("variant"):
            model: nn.Module = timm.create_model(self.name, pretrained=False, **args)
        trained = {key.removeprefix(PARTS): value for block in blocks for key, value in block.items()}
        trained = self.fitted(trained, model)
        state = {
            key: fresh if key.startswith("norm.") else trained[key]
            for key, fresh in model.state_dict().items()
        }
        if norm is not None and self._has_norm(depth):
            state |= {f"norm.{key}": value for key, value in norm.items()}
        model.load_state_dict(state)
        return model.eval()

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """See `Backbone.variant_args`."""
        if not 1 <= depth <= self._ends[-1]:
            raise ValueError(
                f"a variant of depth {depth} is asked of '{self.name}', which has {self._ends[-1]} layers"
            )
        size = image_size or self.image_size
        self.check_size(size)
        layers = [span.end for span in spans_between(self._ends, 0, depth)]
        shortened = {
            key: list(value)[: len(layers)]
            if key in self.per_level and isinstance(value, list | tuple) and len(value) == len(self.levels)
            else value
            for key, value in self._args.items()
        }
        grid = (size[0] // self.levels[0].stride, size[1] // self.levels[0].stride)
        own = {"img_size": list(size), **self.variant_only}
        return shortened | own | self.sizes_of_levels(layers, grid)

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Backbone.check_size`."""
        check_divisible(size, self.unit, f"the mask unit of '{self.name}', {self.unit} pixels a side")

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Backbone.grid_at`."""
        self.check_size(size)
        return size[0] // self.unit, size[1] // self.unit

    def padded_levels(self, size: Pair) -> list[int]:
        """See `Backbone.padded_levels`."""
        self.check_size(size)
        return [
            number
            for number, (level, window) in enumerate(zip(self.levels, self.windows_at(size), strict=True))
            if window and any(side // level.stride % width for side, width in zip(size, window, strict=True))
        ]

    def reopen(self, folder: Path, depth: int) -> nn.Module:
        """See `Backbone.reopen`."""
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()

    def usage(self, depth: int) -> Usage:
        """See `Backbone.usage`."""
        levels = self.levels[: len(spans_between(self._ends, 0, depth))]
        says = "the mean of the feature map over its places, after the final norm; `model.forward_features` gives the map"
        sizes = f"images may have any size that is a multiple of {levels[-1].stride}"
        if any(level.window for level in levels):
            sizes += (
                ", windows staying as they are at {size}; where a map is no multiple of its window, timm fills the border's "
                "windows with empty tokens, which pretraining on visible tokens does not know"
            )
        return Usage("model(x)", says, sizes, levels[-1].width, self._has_norm(depth))

    def _info(self, index: int, start: int, end: int) -> BlockInfo:
        last = self.levels[spans_between(self._ends, start, end)[-1].level]
        grid = (self.image_size[0] // last.stride, self.image_size[1] // last.stride)
        return BlockInfo(index, end - start, end, last.width, grid, num_prefix_tokens=0, stride=last.stride)

    def _block_of(self, model: nn.Module, index: int) -> VisibleBlock:
        """Take block `index` out of a whole model, which is not to be used afterwards."""
        paths = [path for span in self._spans[index] for path in self.paths(span)]
        parts = {path: model.get_submodule(path) for path in paths}
        return self.block_class(parts, self._spans[index], self._scales, self._needs[index])

    def _check_fit(self, weights: Weights, block: VisibleBlock) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's tensors by timm's names. Raises ValueError if `weights` lack them, or have others beside."""
        shapes = {key.removeprefix(PARTS): tuple(value.shape) for key, value in block.state_dict().items()}
        roots = [path for span in block.spans for path in self.paths(span)]
        # More layers than the level has would make another model, unless it ends ours.
        roots += [
            path
            for span in block.spans
            if span.end == self.levels[span.level].layers and span.level + 1 < len(self.levels)
            for path in self.paths(Span(span.level, span.end, span.end + 1))
        ]
        check_fit(weights, shapes, roots, left_out="norm.", also=self.clipped(shapes))
        return shapes

    def _block_at(self, depth: int) -> BlockInfo:
        return next(info for info in self.blocks if info.depth >= depth)

    def _has_norm(self, depth: int) -> bool:
        """Whether the norm that was trained on the block in which `depth` lies has the width there."""
        ends_in = spans_between(self._ends, 0, self._block_at(depth).depth)[-1].level
        return spans_between(self._ends, 0, depth)[-1].level == ends_in
