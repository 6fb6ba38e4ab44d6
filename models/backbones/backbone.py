"""What a backbone family must offer, and the looking-at of a timm model that every family starts with.

A backbone is a timm model by its name and keyword overrides, cut into blocks; it holds no weights. Models are
looked at on the meta device, so that settings can be validated in a fraction of a second and before anything
starts.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from bim.models.masks.plan import MaskPlan
from bim.models.seeding import forked_rng

# Overrides that are not the user's: the value is what the project itself needs, or does elsewhere.
OWNED_ARGS = {
    "num_classes": "a variant has no classifier",
    "global_pool": "the embedding is the mean of the patch tokens",
    "fc_norm": "the decoder's norm becomes the final norm",
    "final_norm": "the decoder's norm becomes the final norm",
    "pool_include_prefix": "the embedding is the mean of the patch tokens",
    "in_chans": "images have three channels",
    "drop_rate": "pretraining uses no dropout",
    "pos_drop_rate": "pretraining uses no dropout",
    "patch_drop_rate": "the mask decides which patches are seen; set mask.ratio",
    "proj_drop_rate": "pretraining uses no dropout",
    "attn_drop_rate": "pretraining uses no dropout",
    "drop_path_rate": "pretraining uses no stochastic depth",
    "weight_init": "blocks are initialised as in MAE, or by init_from",
    "fix_init": "blocks are initialised as in MAE, or by init_from",
    "embed_layer": "it takes a class, which a model's config.json cannot name",
    "block_fn": "it takes a class, which a model's config.json cannot name",
    "mlp_layer": "it takes a class, which a model's config.json cannot name",
    "strict_img_size": "every image size is taken",
    "head_norm_first": "the decoder's norm becomes the final norm",
    "head_hidden_size": "a variant has no classifier",
    "drop_block_rate": "pretraining uses no dropout",
    "device": "placement is a setting of its own",
    "dtype": "optim.precision sets it",
}

# Of timm's factory, not of a model: they would make another kind of model, or load weights.
PROJECT_ARGS = frozenset(
    {"features_only", "out_indices", "feature_cls", "pretrained", "pretrained_strict", "scriptable"}
)

# Types of timm's keywords that can be checked, and how to say them.
SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


@dataclass(frozen=True)
class BlockInfo:
    """Where one block stands in the backbone.

    layers: transformer layers (or residual blocks) of this block. depth: layers up to its end. width: of the tokens it
    emits. grid: (rows, columns) of the tokens it emits for a whole image of the backbone's image_size.
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
    """How to use an exported variant, for its card.

    call: the Python expression that turns images `x` into embeddings with the opened `model`. says: what they are.
    sizes: which image sizes it takes. width: of the embedding. trained_norm: whether its final norm is a decoder's.
    classifier: whether timm can put a new classifier on it.
    """

    call: str
    says: str
    sizes: str
    width: int
    trained_norm: bool
    classifier: bool = True


class Backbone(Protocol):
    """A timm model cut into blocks. Holds sizes, no weights; cheap to make, in any process.

    name: timm name. model_args: keyword overrides. encode: "visible", blocks drop the tokens of masked units;
    "all", the first block paints masked units and every token travels. image_size: (height, width) in pixels that
    it is built for; blocks take any other that `check_size` passes. unit: side of a mask unit in pixels.
    grid: (rows, columns) of mask units at image_size. blocks: in order of depth. depths: where variants can be
    made, in layers. mean, std: of timm's preprocessing, per channel. norm_eps: eps of the final norm; a decoder's
    norm takes its place and must share it. mask_per_batch_default: whether all samples of a batch share their mask unless
    the user asks otherwise.
    """

    name: str
    model_args: dict[str, Any]
    encode: str
    image_size: tuple[int, int]
    unit: int
    grid: tuple[int, int]
    blocks: tuple[BlockInfo, ...]
    depths: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm_eps: float
    mask_per_batch_default: bool

    def prepared(self, plans: Mapping[int, MaskPlan], sweep: bool = False) -> dict[int, MaskPlan]:
        """The plans of one batch, by block, with what the blocks' encoders need worked out from them (`MaskPlan.layout`).

        On the CPU and of the plans alone, so that it can be done ahead of the step; a block does it itself otherwise.
        sweep: choose the sizes of groups of windows by GreenMIM's full sweep (`window_groups.swept_size`), which costs the
        host more and the step less; without effect where windows are not grouped.
        """
        ...

    def build_block(self, index: int, seed: int, init_from: str | None = None) -> nn.Module:
        """The block as a module: forward(x, plan) -> (B, P + Nv, D), the un-normalised residual stream.

        Block 0 takes images (B, 3, H, W), the others the tokens of the block before them in the plan's order.
        With encode "all" it gives every token, row by row: (B, P + h * w, D). Images may have any size that
        `check_size` passes; plan.grid is that size's. Parameters depend on (seed, index) alone (the family's own
        initialisation), or are those of `init_from`; see `check_init_from`.
        """
        ...

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError, naming the setting, if the blocks cannot take images of `size` (height, width)."""
        ...

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of mask units of an image of `size`. Raises ValueError as `check_size`."""
        ...

    def padded_levels(self, size: tuple[int, int]) -> list[int]:
        """Numbers of the levels, from 0, in which a variant for images of `size` (height, width) computes something else
        than the blocks: timm pads their maps to whole windows with keys that pretraining never saw.

        Empty where windows divide the maps, or there are none. Raises ValueError as `check_size`.
        """
        ...

    def check_init_from(self, init_from: str) -> None:
        """Raises ValueError if `init_from` cannot be read or does not fit this backbone. Reads no more than
        it must.

        `init_from` is a timm name (its pretrained weights), a timm folder (DIR or local-dir:DIR) or a weights
        file.
        """
        ...

    def variant(
        self,
        depth: int,
        blocks: Sequence[Mapping[str, Tensor]],
        norm: Mapping[str, Tensor] | None,
        image_size: tuple[int, int] | None = None,
    ) -> nn.Module:
        """The first `depth` layers as a timm model whose pooled output is the mean of the patch tokens after
        `norm`.

        blocks: state dicts of the built blocks 0.., as many as the depth needs; `depth` may lie inside a
        block. norm: "weight" and "bias" of the final norm; None leaves it as a fresh one. A family without a place
        for it leaves it out and says so in `usage`. image_size: (height, width) to build it for, with the positions
        that the blocks use there; None: the backbone's own.
        """
        ...

    def variant_args(self, depth: int, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """The arguments with which `timm.create_model(name, **args)` builds that variant.

        Raises ValueError if `depth` is none of `depths`.
        """
        ...

    def reopen(self, folder: Path, depth: int) -> nn.Module:
        """What timm makes of an exported folder, in evaluation mode: images (B, 3, H, W) -> embeddings (B, D)."""
        ...

    def usage(self, depth: int) -> Usage:
        """What to tell those who open the folder of that variant."""
        ...


def split_layers(layers: int, blocks: int | Sequence[int]) -> tuple[int, ...]:
    """Layers per block: `blocks` blocks as equal as can be (the first ones larger), or the given sizes.

    Raises ValueError if there are more blocks than layers, or the sizes do not add up to `layers`.
    """
    if isinstance(blocks, int):
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}; at least 1 is needed")
        if layers < 1:
            raise ValueError(f"the backbone has {layers} layers; set backbone.model_args.depth to 1 or more")
        if blocks > layers:
            raise ValueError(
                f"blocks is {blocks}, but the backbone has only {layers} layers; ask for {layers} at most"
            )
        size, rest = divmod(layers, blocks)
        return tuple(size + (index < rest) for index in range(blocks))
    sizes = tuple(blocks)
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"blocks is {list(sizes)}; every block needs at least 1 layer")
    if sum(sizes) != layers:
        raise ValueError(
            f"blocks {list(sizes)} hold {sum(sizes)} layers together, but the backbone has {layers}; "
            f"make them add up to {layers}"
        )
    return sizes


def too_few_blocks(blocks: int, layers: int, depth: int) -> ValueError:
    """What a backbone raises that is asked for a variant deeper than the blocks it was given."""
    return ValueError(f"{blocks} blocks hold {layers} layers; a variant of depth {depth} needs more of them")


def check_divisible(size: tuple[int, int], unit: int, what: str) -> None:
    """Raises ValueError if a side of `size` (height, width) is not a multiple of `unit`, which messages call `what`."""
    if any(side < unit or side % unit for side in size):
        raise ValueError(
            f"image size {size[0]} x {size[1]} is not divisible by {what}; set backbone.model_args.img_size and "
            f"schedule.resolution to multiples of {unit}"
        )


def check_name(name: str) -> None:
    """Raises ValueError, with the three nearest names, if `name` is not timm's (with or without a tag)."""
    if timm.is_model(name) and ":" not in name:
        try:
            get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError:
            arch, _, tag = name.partition(".")
            tags = sorted(full.partition(".")[2] for full in timm.list_pretrained(arch + ".*"))
            raise ValueError(
                f"backbone '{arch}' has no tag '{tag}' in timm; its tags are {', '.join(tags) or 'none'}"
            ) from None
        return
    nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
    raise ValueError(
        f"unknown backbone '{name}'; the nearest timm names are {', '.join(repr(near) for near in nearest)}"
    )


def look_at(name: str, overrides: Mapping[str, Any], **fixed: Any) -> Any:
    """The timm model on the meta device: class and sizes without memory.

    overrides: the user's keywords, fixed: the project's. Raises ValueError if timm refuses them.
    """
    try:
        # On the meta device nothing is drawn, but some constructors build a constant on the CPU.
        with forked_rng("look"), torch.device("meta"):
            return timm.create_model(name, pretrained=False, **overrides, **fixed)
    except (
        TypeError,
        AssertionError,
        RuntimeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as error:
        raise ValueError(
            f"timm cannot build '{name}' with backbone.model_args {dict(overrides)}: "
            f"{str(error) or type(error).__name__}"
        ) from error


def check_overrides(name: str, model_class: type[nn.Module], args: Mapping[str, Any]) -> None:
    """Raises ValueError if an override is unknown to the class, not the user's to set, or cannot be saved."""
    parameters = inspect.signature(model_class).parameters
    accepted = set(parameters) - set(OWNED_ARGS)
    # Some classes take the keywords of a record of theirs besides: timm refuses what does not fit it.
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in args.items():
        if key in OWNED_ARGS:
            raise ValueError(
                f"backbone.model_args: '{key}' cannot be set, since {OWNED_ARGS[key]}; leave it out"
            )
        if key not in accepted and not (open_ended and key not in PROJECT_ARGS):
            nearest = difflib.get_close_matches(key, accepted, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"it takes {', '.join(sorted(accepted))}"
            raise ValueError(f"backbone.model_args: '{name}' takes no '{key}'; {hint}")
        if value is None:
            raise ValueError(
                f"backbone.model_args: '{key}' is null, which timm passes over in silence; leave it out"
            )
        kind = parameters[key].annotation if key in parameters else None
        if kind in SCALARS and not (type(value) is kind or (kind is float and type(value) is int)):
            raise ValueError(f"backbone.model_args: '{key}' is {value!r}; it must be {SCALARS[kind]}")
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"backbone.model_args: '{key}' is {value!r}, which cannot be written to config.json; "
                "use numbers, strings, booleans and lists"
            ) from None


def random_variant(backbone: Backbone, depth: int, seed: int) -> nn.Module:
    """The variant of `depth` layers with the parameters it would start from: the baseline of trained ones."""
    states: list[Mapping[str, Tensor]] = []
    for block in backbone.blocks:
        states.append(backbone.build_block(block.index, seed).state_dict())
        if block.depth >= depth:
            break
    return backbone.variant(depth, states, norm=None)
