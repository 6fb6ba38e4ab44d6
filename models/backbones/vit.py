"""timm's VisionTransformer, in its variants, cut into blocks of layers that encode visible tokens only, or all of them.

Block 0 holds the patch embedding, the class and register tokens and the positions, which are fixed: MAE's
sin-cos table, or those of `init_from` resampled to the grid; both follow images of other sizes. The cut takes whole
layers as timm builds them; what it would get wrong is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
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
from bim.models.backbones.paint import PAINT, Paint, check_grid
from bim.models.backbones.positions import positions_on
from bim.models.backbones.weights import Weights, open_weights
from bim.models.initialization import TOKEN_STD, mae_init_
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng
from bim.models.tokens import gather_tokens, patchify, sincos_positions

# What makes the pooled output of any VisionTransformer the mean of its patch tokens after the final norm.
EMBEDDING_ARGS = {
    "num_classes": 0,
    "global_pool": "avg",
    "fc_norm": False,
    "final_norm": True,
    "pool_include_prefix": False,
}
STEM, LAYERS = "stem.", "layers."


class ViTStem(nn.Module):
    """Images of any size -> the tokens that enter the first layer, for visible patches only; named as in timm.

    With `paint` it embeds all patches, those of masked units in the paint's colour.
    pos_embed: (1, N or P + N, D), a buffer: saved, never trained. Positions for the grids of other image sizes are made
    of it when they are first needed, and not saved.
    """

    pos_embed: Tensor

    def __init__(self, model: VisionTransformer, positions: Tensor, paint: Paint | None = None) -> None:
        super().__init__()
        self.patch_embed = model.patch_embed
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.num_prefix_tokens: int = model.num_prefix_tokens
        # Prefix tokens that have a row of their own among the positions.
        self.prefix_rows: int = 0 if model.no_embed_class else model.num_prefix_tokens
        self.cls_token: nn.Parameter | None = model.cls_token
        self.reg_token: nn.Parameter | None = model.reg_token
        self.norm_pre = model.norm_pre
        self.paint = paint
        self.register_buffer("pos_embed", positions)
        self._elsewhere: dict[tuple[int, int], Tensor] = {}

    def forward(self, images: Tensor, plan: MaskPlan) -> Tensor:
        """images: (B, 3, H, W), plan over their N patches -> (B, P + Nv, D): prefix tokens, then visible patches.

        With paint (B, P + N, D), all patches row by row. Raises ValueError if the plan's grid is not the images'.
        """
        check_grid(images, self.patch_size, plan)
        positions = self.positions(plan.grid)
        # The convolution's stride is its kernel: it is a linear map per patch, and only visible patches need it.
        # It also takes any number of them, which timm's patch embedding may not.
        if self.paint is None:
            patches = gather_tokens(patchify(images, self.patch_size), plan.keep)  # (B, Nv, p * p * 3)
            places = positions[0, self.prefix_rows :][plan.keep]
        else:
            patches = patchify(self.paint(images, plan), self.patch_size)
            places = positions[:, self.prefix_rows :]
        conv = self.patch_embed.proj
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 3, p, p) -> (D, p * p * 3)
        x = self.patch_embed.norm(F.linear(patches, weight, conv.bias)) + places

        prefix = [
            token.expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if prefix:
            heads = torch.cat(prefix, dim=1)
            x = torch.cat([heads + positions[:, : self.prefix_rows] if self.prefix_rows else heads, x], dim=1)
        embedded: Tensor = self.norm_pre(x)
        return embedded

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, R + N, D), R prefix rows: the positions of a grid of patches; see `positions_on`."""
        if grid == self.grid:
            return self.pos_embed
        if grid not in self._elsewhere:
            self._elsewhere[grid] = positions_on(self.pos_embed, self.prefix_rows, self.grid, grid)
        return self._elsewhere[grid]

    def _apply(self, fn: Any, recurse: bool = True) -> ViTStem:
        self._elsewhere.clear()  # they belong to the buffer as it was, and to its device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._elsewhere.clear()
        super()._load_from_state_dict(*args, **kwargs)


class ViTBlock(nn.Module):
    """A run of timm's layers; with a stem it takes images, without one the tokens of the block before.

    encode: "visible", it drops the tokens that its plan does not keep; "all", it passes every token.
    """

    def __init__(
        self, layers: nn.Sequential, num_prefix_tokens: int, encode: str, stem: ViTStem | None = None
    ) -> None:
        super().__init__()
        self.stem = stem
        self.layers = layers
        self.num_prefix_tokens = num_prefix_tokens
        self.encode = encode

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: images (B, 3, H, W), or tokens (B, P + N', D) with N' >= Nv in plan order -> (B, P + Nv, D).

        With encode "all" tokens are (B, P + N, D), row by row, on both sides.
        """
        if self.stem is not None:
            x = self.stem(x, plan)
        elif self.encode == "visible":
            # Tokens travel in the order in which they are dropped: the boundary is a slice.
            x = x[:, : self.num_prefix_tokens + plan.visible]
        encoded: Tensor = self.layers(x)
        return encoded


class ViTBackbone:
    """A timm VisionTransformer as a `Backbone`, with or without class token, registers, LayerScale, pre-norm, qk-norm.

    name: timm name. blocks: how many, or their sizes in layers. model_args: keyword overrides of the timm
    model. encode: see `open_backbone`. Raises ValueError for what cannot be cut, with the reason; see `refusal`.
    """

    mask_per_batch_default = False

    def __init__(
        self, name: str, blocks: int | Sequence[int], model_args: Mapping[str, Any], encode: str = "auto"
    ) -> None:
        check_overrides(name, VisionTransformer, model_args)
        self.name = name
        self.encode = "visible" if encode == "auto" else encode
        self.model_args = dict(model_args)
        model = look_at(name, self.model_args, **EMBEDDING_ARGS)
        reason = refusal(model)
        if reason:
            raise ValueError(f"backbone '{name}' cannot be cut into blocks: {reason}")

        embed = model.patch_embed
        self.image_size: tuple[int, int] = tuple(embed.img_size)
        self.unit: int = embed.patch_size[0]
        self.check_size(self.image_size)
        self.grid: tuple[int, int] = self.grid_at(self.image_size)
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])
        self.norm_eps: float = model.norm.eps
        # Prefix tokens whose positions share the table with the patches'.
        self._prefix_rows = 0 if model.no_embed_class else model.num_prefix_tokens
        sizes = split_layers(len(model.blocks), blocks)
        self.depths: tuple[int, ...] = tuple(range(1, len(model.blocks) + 1))
        self.blocks = tuple(
            BlockInfo(
                index=index,
                layers=size,
                depth=sum(sizes[: index + 1]),
                width=model.embed_dim,
                grid=self.grid,
                num_prefix_tokens=model.num_prefix_tokens,
                stride=self.unit,
            )
            for index, size in enumerate(sizes)
        )

    def prepared(self, plans: Mapping[int, MaskPlan], sweep: bool = False) -> dict[int, MaskPlan]:
        """See `Backbone.prepared`: the blocks need no more than the plans."""
        return dict(plans)

    def build_block(self, index: int, seed: int, init_from: str | None = None) -> ViTBlock:
        """See `Backbone.build_block`. A shallow timm model of the block's own layers is built and taken apart."""
        info = self.blocks[index]
        with forked_rng(seed, "init", index):
            model = timm.create_model(self.name, pretrained=False, **self.variant_args(info.layers))
            mae_init_(model)
            for token in (model.cls_token, model.reg_token):
                if token is not None:
                    nn.init.normal_(token, std=TOKEN_STD)
        table = sincos_positions(info.width, self.grid)
        positions = torch.cat([torch.zeros(self._prefix_rows, info.width), table]).unsqueeze(0)
        paint = Paint(self.unit, seed) if self.encode == "all" else None
        stem = ViTStem(model, positions, paint) if index == 0 else None
        block = ViTBlock(model.blocks, info.num_prefix_tokens, self.encode, stem)
        if init_from is not None:
            state = self._initial_state(info, block, open_weights(init_from))
            block.load_state_dict(block.state_dict() | state)  # no checkpoint has the paint
        return block

    def check_init_from(self, init_from: str) -> None:
        """See `Backbone.check_init_from`."""
        weights = open_weights(init_from)
        model = look_at(self.name, self.variant_args(self.blocks[-1].depth))
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        check_fit(weights, {key: shape for key, shape in expected.items() if not key.startswith("norm.")})
        self._source_positions(weights)

    def variant(
        self,
        depth: int,
        blocks: Sequence[Mapping[str, Tensor]],
        norm: Mapping[str, Tensor] | None,
        image_size: tuple[int, int] | None = None,
    ) -> nn.Module:
        """See `Backbone.variant`: an ordinary timm VisionTransformer, in evaluation mode."""
        args = self.variant_args(depth, image_size)
        with forked_rng("variant"):
            model: VisionTransformer = timm.create_model(self.name, pretrained=False, **args)
        state = {f"norm.{key}": value for key, value in (norm or model.norm.state_dict()).items()}
        covered = 0
        for info, block in zip(self.blocks, blocks, strict=False):
            names = timm_keys(info, block)
            state |= {name: block[key] for key, name in names.items() if layer_of(name) < depth}
            covered = info.depth
        if covered < depth:
            raise too_few_blocks(len(blocks), covered, depth)
        grid = tuple(model.patch_embed.grid_size)
        state["pos_embed"] = positions_on(state["pos_embed"], self._prefix_rows, self.grid, grid)
        model.load_state_dict(state)
        return model.eval()

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """See `Backbone.variant_args`."""
        if not 1 <= depth <= self.blocks[-1].depth:
            raise ValueError(
                f"a variant of depth {depth} is asked of a backbone of {self.blocks[-1].depth} layers"
            )
        height, width = size = image_size or self.image_size
        self.check_size(size)
        return (
            self.model_args
            | {"depth": depth, "img_size": height if height == width else [height, width]}
            | EMBEDDING_ARGS
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Backbone.check_size`."""
        check_divisible(size, self.unit, f"the patch size {self.unit} of '{self.name}'")

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Backbone.grid_at`."""
        self.check_size(size)
        return size[0] // self.unit, size[1] // self.unit

    def padded_levels(self, size: tuple[int, int]) -> list[int]:
        """See `Backbone.padded_levels`: there are no windows."""
        self.check_size(size)
        return []

    def reopen(self, folder: Path, depth: int) -> nn.Module:
        """See `Backbone.reopen`."""
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()

    def usage(self, depth: int) -> Usage:
        """See `Backbone.usage`."""
        says = "the mean of the patch tokens after the final norm; `model.forward_features` gives the tokens"
        sizes = "`img_size=...` opens it for another size than {size} (positions are resampled)"
        return Usage("model(x)", says, sizes, self.blocks[0].width, trained_norm=True)

    def _initial_state(self, info: BlockInfo, block: ViTBlock, weights: Weights) -> dict[str, Tensor]:
        """The block's state dict out of a checkpoint of the whole model, positions resampled to the grid."""
        state = block.state_dict()
        names = timm_keys(info, state)
        shapes = {name: tuple(state[key].shape) for key, name in names.items()}
        check_fit(weights, shapes)
        tensors = weights.take(names.values())
        if block.stem is not None:
            rows, grid = self._source_positions(weights)
            positions = tensors["pos_embed"]
            if rows != self._prefix_rows:
                blank = positions.new_zeros(1, self._prefix_rows, positions.shape[-1])
                positions = torch.cat([blank, positions[:, rows:]], dim=1)
            tensors["pos_embed"] = positions_on(positions, self._prefix_rows, grid, self.grid)
        return {key: tensors[name] for key, name in names.items()}

    def _source_positions(self, weights: Weights) -> tuple[int, tuple[int, int]]:
        """How many rows of a checkpoint's positions belong to prefix tokens, and the grid of the others.

        Raises ValueError if no grid fits, or if prefix tokens that this backbone has carry positions it has
        no room for.
        """
        length = weights.shapes["pos_embed"][1]
        prefix = ("cls_token" in weights.shapes) + weights.shapes.get("reg_token", (1, 0))[1]
        for rows in dict.fromkeys((prefix, 0)):
            cells = length - rows
            side = math.isqrt(max(cells, 0))
            known = weights.image_size and (
                weights.image_size[0] // self.unit,
                weights.image_size[1] // self.unit,
            )
            grid = next(
                (grid for grid in (known, self.grid, (side, side)) if grid and math.prod(grid) == cells), None
            )
            if grid is None:
                continue
            # No row for a prefix token is the same as a row of zeros; a row without its token is dropped with it.
            if rows in (0, self._prefix_rows) or self.blocks[0].num_prefix_tokens == 0:
                return rows, grid
        raise ValueError(
            f"init_from: the {length} positions of {weights.source}, which has {prefix} prefix tokens, do not fit "
            f"'{self.name}', whose table has {self._prefix_rows} rows for prefix tokens; check class_token and "
            "no_embed_class in backbone.model_args"
        )


def refusal(model: Any) -> str | None:
    """Why this timm model cannot be cut by `ViTBackbone`, or None if it can."""
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}, not exactly timm's VisionTransformer"
    if type(model.patch_embed) is not PatchEmbed:
        kind = type(model.patch_embed).__name__
        return f"its patch embedding is a {kind}, a network that looks beyond a patch and cannot embed visible patches alone"
    height, width = model.patch_embed.patch_size
    if height != width:
        return f"its patches are {height} x {width}; only square ones are supported"
    if model.pos_embed is None:
        return "it has no absolute positions, and masked units would be indistinguishable"
    if not isinstance(model.norm, nn.LayerNorm) or model.norm.bias is None:
        return f"its final norm is a {type(model.norm).__name__}; a decoder's norm, which takes its place, is a LayerNorm"
    if any(hasattr(module, "lambda_init") for module in model.blocks.modules()):
        return "its differential attention depends on a layer's place in the whole model, which a block does not know"
    if model.embed_dim % 4:
        return f"its width {model.embed_dim} is not divisible by 4, as sin-cos positions need"
    return None


def check_fit(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the checkpoint lacks a tensor, has one of another shape, or layers with parts
    unknown here.

    expected: shapes by timm's names. Positions may be longer or shorter, their width may not differ.
    """
    for key, shape in expected.items():
        found = weights.shapes.get(key)
        if found is None:
            raise ValueError(
                f"init_from: {weights.source} has no '{key}', which the backbone needs; "
                "check backbone.name and backbone.model_args"
            )
        if found != shape and (key != "pos_embed" or len(found) != 3 or found[-1] != shape[-1]):
            raise ValueError(
                f"init_from: '{key}' of {weights.source} has shape {found}, the backbone needs {shape}; "
                "check backbone.name and backbone.model_args"
            )
    # A LayerScale or a norm that is left behind in silence would make another model of the same weights.
    roots = tuple({".".join(key.split(".")[:2]) + "." for key in expected if key.startswith("blocks.")})
    if "pos_embed" in expected:
        roots += ("patch_embed.", "norm_pre.")
    unknown = [key for key in weights.shapes if key.startswith(roots) and key not in expected]
    if unknown:
        raise ValueError(
            f"init_from: {weights.source} has '{unknown[0]}', which the backbone does not; its layers are of another kind"
        )


def timm_keys(info: BlockInfo, keys: Iterable[str]) -> dict[str, str]:
    """Keys of a block's state dict -> those of the same tensors in the whole timm model, which has no paint."""
    return {key: timm_key(info, key) for key in keys if not key.startswith(STEM + PAINT)}


def timm_key(info: BlockInfo, key: str) -> str:
    """A key of a block's state dict -> the key of the same tensor in the whole timm model."""
    if key.startswith(STEM):
        return key.removeprefix(STEM)
    layer, rest = key.removeprefix(LAYERS).split(".", 1)
    return f"blocks.{info.depth - info.layers + int(layer)}.{rest}"


def layer_of(key: str) -> int:
    """The layer that a key of the whole timm model belongs to; -1 for what comes before the layers."""
    return int(key.split(".")[1]) if key.startswith("blocks.") else -1
