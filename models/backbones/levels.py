"""timm's pyramids seen as a chain: a stem and levels, each at one resolution, that run one after the other.

timm itself takes such models apart for `features_only`; what it does not give as a chain there is refused here.
`FAMILIES` tells what else differs between families. Knows no blocks, no masks and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import FeatureListNet
from torch import nn

from bim.models.backbones.backbone import look_at
from bim.models.backbones.level_modules import run_chain
from bim.models.seeding import forked_rng


@dataclass(frozen=True)
class Family:
    """What is particular to a class of timm's.

    fixed: keywords that the project sets; those that the class does not take are left out.
    per_level: keywords with one entry per level. truncates: fewer entries there make a model of fewer levels.
    whole: the full model's `forward_features` is its chain and its final norm, and nothing else.
    norm: module path of the final norm, "{}" being the last level's number; None: there is none at the end of the chain.
    level_norm: name of a norm that ends each level, inside it; what enters it is the residual stream.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    per_level: tuple[str, ...] = ()
    truncates: bool = False
    whole: bool = False
    norm: str | None = None
    level_norm: str | None = None


# Images of every size: masks of shifted windows are made for the map at hand, smaller maps are padded to the window.
ANY_SIZE = {"strict_img_size": False}
SWIN = Family(
    fixed=ANY_SIZE,
    per_level=("depths", "num_heads", "head_dim", "window_size", "mlp_ratio", "pretrained_window_sizes"),
    truncates=True,
    whole=True,
    norm="norm",
)
# By the class that timm builds; the variants of others have no norm and are opened with `features_only`.
FAMILIES = {
    "SwinTransformer": SWIN,
    "SwinTransformerV2": SWIN,
    "PyramidVisionTransformerV2": Family(
        per_level=("depths", "embed_dims", "num_heads", "sr_ratios", "mlp_ratios"),
        truncates=True,
        whole=True,
        norm="stages.{}.norm",
        level_norm="norm",
    ),
    # timm can put ConvNeXt's last norm before the pooling, where the decoder's norm belongs; then it has no hidden head.
    "ConvNeXt": Family(fixed={"head_norm_first": True, "head_hidden_size": 0}, whole=True, norm="norm_pre"),
    "ResNet": Family(whole=True),
}


@dataclass(frozen=True)
class Level:
    """The part of a pyramid that works at one resolution; what brings the map to it belongs to it.

    parts: module paths in timm's model, run in this order; level 0's begin with the stem. layers: residual blocks.
    width: channels. stride: pixels per side of a token. feature: the number of timm's feature map that it ends in.
    """

    parts: tuple[str, ...]
    layers: int
    width: int
    stride: int
    feature: int


@dataclass(frozen=True)
class Pyramid:
    """A timm pyramid on the meta device, taken apart. channels_last: maps are (B, h, w, C), else (B, C, h, w)."""

    model: nn.Module
    levels: tuple[Level, ...]
    channels_last: bool
    family: Family

    @property
    def norm_path(self) -> str | None:
        return self.family.norm and self.family.norm.format(len(self.levels) - 1)


def take_apart(name: str, args: Mapping[str, Any]) -> Pyramid:
    """timm's `name`, built with `args`, as levels. Raises ValueError if timm refuses it, or it is no chain of levels."""
    model = look_at(name, args)
    kind = type(model).__name__
    not_a_chain = ValueError(
        f"backbone '{name}' is timm's {kind}, which cannot be cut into blocks: timm does not give its feature maps as a "
        "chain of modules; choose a ViT such as 'vit_small_patch16_224' or a pyramid such as "
        "'swin_tiny_patch4_window7_224', 'pvt_v2_b2', 'convnext_tiny' or 'resnet50'"
    )
    try:
        net = look_at(name, args, features_only=True)
    except ValueError:
        raise not_a_chain from None
    if type(net) is not FeatureListNet:
        raise not_a_chain
    infos = net.feature_info.info
    paths = list(chain_paths(model, nested=any("." in info["module"] for info in infos)))
    if [path.replace(".", "_") for path in paths[: len(net)]] != list(net.keys()):
        raise not_a_chain
    try:
        levels = tuple(read_levels(model, paths, infos))
    except ValueError as error:
        raise ValueError(f"backbone '{name}' cannot be cut into blocks: {error}") from None
    return Pyramid(model, levels, str(net.output_fmt.value) == "NHWC", FAMILIES.get(kind, Family()))


def chain_paths(model: nn.Module, nested: bool) -> Iterator[str]:
    """Paths of a model's parts in the order of use; with `nested`, those inside its Sequentials too, as in timm."""
    for name, module in model.named_children():
        if nested and isinstance(module, nn.Sequential):
            yield from (f"{name}.{inner}" for inner, _ in module.named_children())
        else:
            yield name


def read_levels(
    model: nn.Module, paths: Sequence[str], infos: Sequence[Mapping[str, Any]]
) -> Iterator[Level]:
    """The levels of a chain, by timm's own record of its feature maps.

    A feature map before the first layer (a ResNet's, after its stem) is no level. Raises ValueError if the strides do not
    nest, or the record does not fit the chain.
    """
    start, before = 0, 0
    for number, info in enumerate(infos):
        end = paths.index(info["module"]) + 1
        layers = count_layers(model.get_submodule(info["module"]))
        if layers == 0 and start == 0:
            continue
        stride = int(info["reduction"])
        if end <= start or (before and stride % before):
            raise ValueError(f"its feature map {number} has stride {stride} after one of {before}")
        yield Level(tuple(paths[start:end]), max(layers, 1), int(info["num_chs"]), stride, number)
        start, before = end, stride
    if not start:
        raise ValueError("it has no level with layers")


def count_layers(module: nn.Module) -> int:
    """Layers of a level: its `blocks`, the members of a Sequential, or children that are all of one class; else 0."""
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        return len(blocks)
    children = list(module.children())
    alike = len({type(child) for child in children}) == 1
    return len(children) if isinstance(module, nn.Sequential) or (alike and len(children) > 0) else 0


def check_maps(pyramid: Pyramid, size: tuple[int, int]) -> None:
    """Raises ValueError if the chain does not turn images of `size` into the maps that timm's record tells.

    Runs it on the meta device: shapes only.
    """
    with forked_rng("maps"), torch.inference_mode(), torch.device("meta"):
        x = torch.empty(1, 3, *size)
        model = pyramid.model.eval()
        for level in pyramid.levels:
            wanted = (size[0] // level.stride, size[1] // level.stride, level.width)
            try:
                x = run_chain(model.get_submodule, level.parts, x)
                found = tuple(x.shape[1:] if pyramid.channels_last else x.permute(0, 2, 3, 1).shape[1:])
            except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"level at stride {level.stride} fails ({reason})") from error
            if found != wanted:
                raise ValueError(f"the map at stride {level.stride} is {found}, not {wanted}")
