"""timm's VisionTransformer, in its variants, as a backbone that encodes visible tokens only, or all of them.

Block 0 holds the patch embedding, the class and register tokens and fixed positions: MAE's sin-cos table, or those of
`init_from` resampled to the grid. The cut takes whole timm layers; models that it cannot cut are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone, Usage
from bim.models.backbones.cuts import AFTER_LAYERS, block_boundaries
from bim.models.backbones.mask_fill import MASK_FILL, MaskFill
from bim.models.backbones.positions import positions_on
from bim.models.backbones.timm_models import build_on_meta, check_overrides
from bim.models.backbones.vit_block import ViTBlock, ViTStem
from bim.models.backbones.weights import Weights, check_fit
from bim.models.initialization import TOKEN_STD, mae_init_
from bim.models.tokens import sincos_positions

# With these the pooled output of any VisionTransformer is the mean of its patch tokens after the final norm.
EMBEDDING_ARGS = {
    "num_classes": 0,
    "global_pool": "avg",
    "fc_norm": False,
    "final_norm": True,
    "pool_include_prefix": False,
}
STEM, LAYERS = "stem.", "layers."


class ViTBackbone(Backbone):
    """A timm VisionTransformer, with or without class token, registers, LayerScale, pre-norm, qk-norm.

    name: timm name. blocks: their number, or their sizes in layers. model_args: keyword overrides of the timm model.
    encode: see `open_backbone`. Raises ValueError, with the reason, for models that cannot be cut; see `refusal`.
    """

    mask_unit_name = "patch size"

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        check_overrides(name, VisionTransformer, model_args)
        self.encode = "visible" if encode == "auto" else encode
        model = build_on_meta(name, model_args, **EMBEDDING_ARGS)
        reason = refusal(model)
        if reason:
            raise ValueError(f"backbone '{name}' cannot be cut into blocks: {reason}")
        patch_px: int = model.patch_embed.patch_size[0]
        super().__init__(
            name,
            model_args,
            model.pretrained_cfg,
            image_size=tuple(model.patch_embed.img_size),
            mask_unit_px=patch_px,
            norm_eps=model.norm.eps,
        )
        # Prefix tokens with a row of their own in the table of positions.
        self._prefix_rows = 0 if model.no_embed_class else model.num_prefix_tokens
        self.depths = tuple(range(1, len(model.blocks) + 1))
        boundaries = block_boundaries(name, [len(model.blocks)], blocks, AFTER_LAYERS)
        self.blocks = tuple(
            self._block_info(index, end - start, end, model.embed_dim, patch_px, model.num_prefix_tokens)
            for index, (start, end) in enumerate(pairwise((0, *boundaries)))
        )

    def to_variant(self, trained: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """See `Backbone.to_variant`: positions are those of the variant's grid."""
        grid = tuple(model.patch_embed.grid_size)
        positions = positions_on(trained["pos_embed"], self._prefix_rows, self.grid, grid)
        return trained | {"pos_embed": positions}

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """See `Backbone.variant_args`."""
        self._check_depth(depth)
        height, width = size = image_size or self.image_size
        self.check_size(size)
        img_size = height if height == width else [height, width]
        return self.model_args | {"depth": depth, "img_size": img_size} | EMBEDDING_ARGS

    def usage(self, depth: int) -> Usage:
        """See `Backbone.usage`."""
        description = (
            "the mean of the patch tokens after the final norm; `model.forward_features` gives the tokens"
        )
        sizes = "`img_size=...` opens it for another size than {size} (positions are resampled)"
        return Usage("model(x)", description, sizes, self.blocks[0].width, trained_norm=True)

    def from_checkpoint(self, weights: Weights, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Backbone.from_checkpoint`: positions are resampled to the backbone's grid."""
        tensors = weights.take(drawn)
        if "pos_embed" in tensors:
            rows, grid = self._checkpoint_positions(weights)
            positions = tensors["pos_embed"]
            if rows != self._prefix_rows:
                zeros = positions.new_zeros(1, self._prefix_rows, positions.shape[-1])
                positions = torch.cat([zeros, positions[:, rows:]], dim=1)
            tensors["pos_embed"] = positions_on(positions, self._prefix_rows, grid, self.grid)
        return tensors

    def _block_args(self, index: int) -> dict[str, Any]:
        """See `Backbone._block_args`: a shallow model of the block's layers."""
        return self.variant_args(self.blocks[index].layers)

    def _new_block_model(self, index: int) -> Any:
        model = super()._new_block_model(index)
        mae_init_(model)
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                nn.init.normal_(token, std=TOKEN_STD)
        return model

    def _extract_block(self, model: Any, index: int, seed: int) -> ViTBlock:
        info, stem = self.blocks[index], None
        if index == 0:
            table = sincos_positions(info.width, self.grid)
            positions = torch.cat([torch.zeros(self._prefix_rows, info.width), table]).unsqueeze(0)
            mask_fill = MaskFill(self.mask_unit_px, seed) if self.encode == "all" else None
            stem = ViTStem(model, positions, mask_fill)
        return ViTBlock(model.blocks, info.num_prefix_tokens, self.encode, stem)

    def _check_weights(self, weights: Weights, block: Any, index: int, tensors: Mapping[str, Tensor]) -> None:
        info = self.blocks[index]
        parts = [f"blocks.{layer}" for layer in range(info.depth - info.layers, info.depth)]
        if index == 0:
            parts += ["patch_embed", "norm_pre"]
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        check_fit(weights, shapes, parts, can_resize=are_positions)
        if index == 0:
            self._checkpoint_positions(weights)

    def _timm_names(self, index: int, keys: Iterable[str]) -> dict[str, str]:
        """See `Backbone._timm_names`: layers are numbered in the whole model."""
        first = self.blocks[index].depth - self.blocks[index].layers
        names = {}
        for key in keys:
            if key.startswith(LAYERS):
                layer, rest = key.removeprefix(LAYERS).split(".", 1)
                names[key] = f"blocks.{first + int(layer)}.{rest}"
            elif not key.startswith(STEM + MASK_FILL):
                names[key] = key.removeprefix(STEM)
        return names

    def _checkpoint_positions(self, weights: Weights) -> tuple[int, tuple[int, int]]:
        """Number of rows of a checkpoint's positions for prefix tokens, and the grid of the others.

        Raises ValueError if no grid fits, or if the checkpoint has positions for prefix tokens where this backbone has
        none for its own.
        """
        length = weights.shapes["pos_embed"][1]
        prefix = ("cls_token" in weights.shapes) + weights.shapes.get("reg_token", (1, 0))[1]
        stated = weights.image_size and (
            weights.image_size[0] // self.mask_unit_px,
            weights.image_size[1] // self.mask_unit_px,
        )
        for rows in dict.fromkeys((prefix, 0)):
            patches = length - rows
            side = math.isqrt(max(patches, 0))
            grids = (
                grid for grid in (stated, self.grid, (side, side)) if grid and math.prod(grid) == patches
            )
            grid = next(grids, None)
            # A missing row equals a row of zeros; without its token a row is dropped.
            if grid and (rows in (0, self._prefix_rows) or self.blocks[0].num_prefix_tokens == 0):
                return rows, grid
        raise ValueError(
            f"init_from: the {length} positions of {weights.source}, which has {prefix} prefix tokens, do not fit "
            f"'{self.name}', whose table has {self._prefix_rows} rows for prefix tokens; check class_token and "
            "no_embed_class in backbone.model_args"
        )


def refusal(model: Any) -> str | None:
    """The reason why `ViTBackbone` cannot cut this timm model, or None if it can."""
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}, not exactly timm's VisionTransformer"
    if type(model.patch_embed) is not PatchEmbed:
        name = type(model.patch_embed).__name__
        return f"its patch embedding is a {name}, a network that looks beyond a patch and cannot embed visible patches alone"
    height, width = model.patch_embed.patch_size
    if height != width:
        return f"its patches are {height} x {width}; only square ones are supported"
    if model.pos_embed is None:
        return "it has no absolute positions, and masked units would be indistinguishable"
    if not isinstance(model.norm, nn.LayerNorm) or model.norm.bias is None:
        return f"its final norm is a {type(model.norm).__name__}; a decoder's norm, which takes its place, is a LayerNorm"
    if any(hasattr(module, "lambda_init") for module in model.blocks.modules()):
        return "its differential attention depends on the index of a layer in the whole model, which a block does not have"
    if model.embed_dim % 4:
        return f"its width {model.embed_dim} is not divisible by 4, as sin-cos positions need"
    return None


def are_positions(key: str, given: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Whether a tensor holds positions of the needed width, which are resampled to any grid."""
    return key == "pos_embed" and len(given) == 3 and given[-1] == needed[-1]
