"""The base class of backbones: a timm model cut into blocks, from initial weights to exported depth variants.

An architecture family implements what differs: the cut, the names of tensors and timm's keywords for fewer layers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
from torch import Tensor, nn

from bim.models.backbones.level_modules import PARTS
from bim.models.backbones.timm_models import build_on_meta, create_model, registering_module
from bim.models.backbones.weights import Weights, open_weights
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockInfo:
    """Position and sizes of one block in the backbone.

    layers: transformer layers (or residual blocks) of this block. depth: layers up to its end. width: of its output
    tokens. grid: (rows, columns) of its output tokens for a whole image of the backbone's image_size.
    num_prefix_tokens: class and register tokens before them. stride: pixels per side of one such token.
    """

    index: int
    layers: int
    depth: int
    width: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    stride: int


@dataclass(frozen=True)
class Usage:
    """How to use an exported variant, for its model card.

    call: the Python expression that turns images `x` into embeddings with the loaded `model`. description: of the
    embeddings. sizes: which image sizes it takes. width: of the embedding. trained_norm: whether its final norm is that of
    a decoder. classifier: whether timm can add a new classifier.
    """

    call: str
    description: str
    sizes: str
    width: int
    trained_norm: bool
    classifier: bool = True


class Backbone(ABC):
    """A timm model cut into blocks. It holds sizes and no weights, and is cheap to make in any process.

    name: timm name. model_args: keyword overrides. encode: "visible", blocks drop the tokens of masked units; "all", the
    first block fills masked units with a color and every token travels. image_size: (height, width) in pixels that it is
    built for; blocks take any other that `check_size` accepts. mask_unit_px: pixels per side of a mask unit.
    grid: (rows, columns) of mask units at image_size. blocks: in order of depth. depths: of possible variants, in layers.
    mean, std: per channel, of timm's preprocessing. norm_eps: eps of the final norm, and of the decoder's norm that takes
    its place. mask_per_batch_default: whether all samples of a batch share their mask by default.
    """

    encode: str
    mask_per_batch_default: ClassVar[bool] = False
    mask_unit_name: ClassVar[str] = "mask unit"
    blocks: tuple[BlockInfo, ...]
    depths: tuple[int, ...]

    def __init__(
        self,
        name: str,
        model_args: Mapping[str, Any],
        pretrained_cfg: Mapping[str, Any],
        image_size: tuple[int, int],
        mask_unit_px: int,
        norm_eps: float,
    ) -> None:
        self.name = name
        self.model_args = dict(model_args)
        self.image_size = image_size
        self.mask_unit_px = mask_unit_px
        self.grid = self.grid_at(image_size)
        self.mean: tuple[float, ...] = tuple(pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(pretrained_cfg["std"])
        self.norm_eps = norm_eps

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError, naming the setting, if the blocks cannot take images of `size` (height, width)."""
        unit = self.mask_unit_px
        if any(side < unit or side % unit for side in size):
            raise ValueError(
                f"image size {size[0]} x {size[1]} is not divisible by the {self.mask_unit_name} {unit} of '{self.name}'; "
                f"set backbone.model_args.img_size and schedule.resolution to multiples of {unit}"
            )

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of mask units of an image of `size`. Raises ValueError as `check_size`."""
        self.check_size(size)
        return size[0] // self.mask_unit_px, size[1] // self.mask_unit_px

    def padded_levels(self, size: tuple[int, int]) -> list[int]:
        """Numbers of the levels, from 0, in which a variant for images of `size` differs from the blocks, because timm pads
        their maps to whole windows with keys that pretraining never sees. Raises ValueError as `check_size`."""
        self.check_size(size)
        return []

    def prepare_plans(self, plans: Mapping[int, MaskPlan], sweep: bool = False) -> dict[int, MaskPlan]:
        """The plans of one batch, by block, with the `encoder_indices` of the blocks.

        It depends on the plans alone and runs on the CPU, ahead of the step; a block computes missing indices itself.
        sweep: choose sizes of window groups by GreenMIM's sweep, see `window_groups.optimal_group_size`.
        """
        return dict(plans)

    def build_block(self, index: int, seed: int, init_from: str | None = None) -> nn.Module:
        """The block as a module: forward(x, plan) -> (B, P + Nv, D), the unnormalized residual stream.

        Block 0 takes images (B, 3, H, W), the others the tokens of the previous block in the plan's order. With encode
        "all" a block returns every token, row by row: (B, P + h * w, D). Images may have any size that `check_size`
        accepts; plan.grid is that of the size. Parameters depend on (seed, index) alone, or are those of `init_from`, see
        `check_init_from`.
        """
        with forked_rng(seed, "init", index):
            block = self._extract_block(self._new_block_model(index), index, seed)
        if init_from is not None:
            weights, state = open_weights(init_from), block.state_dict()
            names = self._timm_names(index, state)
            drawn = {name: state[key] for key, name in names.items()}
            weights = weights.for_names(drawn)
            self._check_weights(weights, block, index, drawn)
            tensors = self.from_checkpoint(weights, drawn)
            block.load_state_dict(state | {key: tensors[name] for key, name in names.items()})
        return block

    def check_init_from(self, init_from: str) -> None:
        """Raises ValueError if `init_from` cannot be read or does not fit this backbone; reads shapes where it can.

        `init_from` is a timm name (its pretrained weights), a timm folder (DIR or local-dir:DIR) or a weights file.
        """
        weights, prefix = open_weights(init_from), ""
        for index in range(len(self.blocks)):
            block = self._extract_block(build_on_meta(self.name, self._block_args(index)), index, seed=0)
            state = block.state_dict()
            tensors = {name: state[key] for key, name in self._timm_names(index, state).items()}
            inner = weights.for_names(tensors)
            self._check_weights(inner, block, index, tensors)
            prefix = prefix or inner.prefix
        if prefix:
            log.info("init_from: the weights of %s are those under '%s'", weights.source, prefix)

    def variant(
        self,
        depth: int,
        blocks: Sequence[Mapping[str, Tensor]],
        norm: Mapping[str, Tensor] | None,
        image_size: tuple[int, int] | None = None,
    ) -> nn.Module:
        """The first `depth` layers as a timm model in evaluation mode; its pooled output is the mean of the patch tokens
        after `norm`.

        blocks: state dicts of the built blocks 0.., as many as the depth needs; `depth` may lie inside a block.
        norm: "weight" and "bias" of the final norm, which has the width of the block in which `depth` lies; None, or a norm
        of another width, leaves a new one. A model without a final norm ignores it, see `usage`.
        image_size: (height, width) to build it for; None: the backbone's.

        Raises ValueError if `depth` is not in `depths`, or `blocks` hold fewer layers.
        """
        args = self.variant_args(depth, image_size)
        if len(blocks) <= self._block_at(depth).index:
            layers = self.blocks[len(blocks) - 1].depth if blocks else 0
            raise ValueError(
                f"{len(blocks)} blocks hold {layers} layers; a variant of depth {depth} needs more of them"
            )
        with forked_rng("variant"):
            model = self._new_variant(depth, args)
        trained = {
            name: block[key]
            for info, block in zip(self.blocks, blocks, strict=False)
            for key, name in self._timm_names(info.index, block).items()
        }
        trained = self.to_variant(trained, model)
        norm_path = self._norm_path(depth)
        state = {
            key: new if norm_path and key.startswith(f"{norm_path}.") and key not in trained else trained[key]
            for key, new in model.state_dict().items()
        }
        if norm is not None and self._has_trained_norm(depth):
            state |= {f"{norm_path}.{key}": value for key, value in norm.items()}
        model.load_state_dict(state)
        return model.eval()

    @abstractmethod
    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """The arguments with which `timm.create_model(name, **args)` builds that variant.

        Raises ValueError if `depth` is not in `depths`.
        """

    def load_exported(self, folder: Path, depth: int) -> nn.Module:
        """timm's model of an exported folder, in evaluation mode: images (B, 3, H, W) -> embeddings (B, D)."""
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()

    @property
    def registered_by(self) -> str | None:
        """The module of the user that registers the model with timm, which `load_exported` needs imported; None: timm."""
        return registering_module(self.name)

    @abstractmethod
    def usage(self, depth: int) -> Usage:
        """How to use the exported folder of that variant."""

    def to_variant(self, trained: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The tensors of blocks, by timm's names, in the shapes of the variant `model`: by default unchanged."""
        return trained

    def from_checkpoint(self, weights: Weights, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by timm's names, as a block takes them. drawn: the block's, by timm's names.

        Raises ValueError if one is missing.
        """
        return weights.take(drawn)

    @abstractmethod
    def _block_args(self, index: int) -> dict[str, Any]:
        """timm's keywords of the model from which the block is extracted."""

    def _new_block_model(self, index: int) -> Any:
        """That model with new parameters, by default with timm's initialization."""
        return create_model(self.name, **self._block_args(index))

    @abstractmethod
    def _extract_block(self, model: Any, index: int, seed: int) -> nn.Module:
        """The block made of modules of `model`, which cannot be used afterward."""

    @abstractmethod
    def _check_weights(self, weights: Weights, block: Any, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError if `weights` do not fit the block. tensors: the block's, by timm's names."""

    def _timm_names(self, index: int, keys: Iterable[str]) -> dict[str, str]:
        """Keys of a block's state dict -> names of the same tensors in timm's model, which has no mask fill."""
        return {key: key.removeprefix(PARTS) for key in keys if key.startswith(PARTS)}

    def _new_variant(self, depth: int, args: Mapping[str, Any]) -> nn.Module:
        model: nn.Module = create_model(self.name, **args)
        return model

    def _norm_path(self, depth: int) -> str | None:
        """Module path of the final norm of a variant, None if it has none."""
        return "norm"

    def _has_trained_norm(self, depth: int) -> bool:
        """Whether a decoder's norm fits the variant: it has a final norm of the width of its last block."""
        return True

    def _block_at(self, depth: int) -> BlockInfo:
        return next(info for info in self.blocks if info.depth >= depth)

    def _check_depth(self, depth: int) -> None:
        if depth not in self.depths:
            raise ValueError(
                f"'{self.name}' has no variant of depth {depth}; its variants have {', '.join(map(str, self.depths))} layers"
            )

    def _block_info(
        self, index: int, layers: int, depth: int, width: int, stride: int, num_prefix_tokens: int = 0
    ) -> BlockInfo:
        grid = (self.image_size[0] // stride, self.image_size[1] // stride)
        return BlockInfo(index, layers, depth, width, grid, num_prefix_tokens, stride)


def random_variant(backbone: Backbone, depth: int, seed: int) -> nn.Module:
    """The variant of `depth` layers with untrained parameters: the baseline of trained ones."""
    states: list[Mapping[str, Tensor]] = []
    for block in backbone.blocks:
        states.append(backbone.build_block(block.index, seed).state_dict())
        if block.depth >= depth:
            break
    return backbone.variant(depth, states, norm=None)
