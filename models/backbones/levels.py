"""timm's pyramids as a chain of levels, each at one resolution (timm calls a level a stage).

timm decomposes such models for `features_only`; models that are no chain there are refused. `FAMILIES` holds what else
differs between architecture families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import FeatureListNet
from torch import nn

from bim.models.backbones.level_modules import run_chain
from bim.models.backbones.timm_models import build_on_meta
from bim.models.seeding import forked_rng


@dataclass(frozen=True)
class ArchitectureFamily:
    """Properties of one of timm's model classes.

    fixed: keywords that the project sets; those that the class does not take are left out.
    per_level: keywords with one entry per level. truncates: fewer entries there make a model of fewer levels.
    whole: `forward_features` of the full model is its chain and its final norm, and nothing else.
    norm: module path of the final norm, "{}" being the last level's number; None: the chain has none at its end.
    level_norm: name of a norm that ends each level, inside it; its input is the residual stream.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    per_level: tuple[str, ...] = ()
    truncates: bool = False
    whole: bool = False
    norm: str | None = None
    level_norm: str | None = None


# Accepts images of every size: masks of shifted windows follow the map, and maps are padded to whole windows.
ANY_SIZE = {"strict_img_size": False}
SWIN = ArchitectureFamily(
    fixed=ANY_SIZE,
    per_level=("depths", "num_heads", "head_dim", "window_size", "mlp_ratio", "pretrained_window_sizes"),
    truncates=True,
    whole=True,
    norm="norm",
)
# By the class that timm builds; variants of other classes have no norm and are opened with `features_only`.
FAMILIES = {
    "SwinTransformer": SWIN,
    "SwinTransformerV2": SWIN,
    "PyramidVisionTransformerV2": ArchitectureFamily(
        per_level=("depths", "embed_dims", "num_heads", "sr_ratios", "mlp_ratios"),
        truncates=True,
        whole=True,
        norm="stages.{}.norm",
        level_norm="norm",
    ),
    "ConvNeXt": ArchitectureFamily(
        # `head_norm_first` moves the last norm before the pooling, as the decoder's norm; it excludes a hidden head.
        fixed={"head_norm_first": True, "head_hidden_size": 0},
        whole=True,
        norm="norm_pre",
    ),
    "ResNet": ArchitectureFamily(whole=True),
}


@dataclass(frozen=True)
class Level:
    """The part of a pyramid at one resolution, with the downsampling that leads to it.

    parts: module paths in timm's model in the order of use; those of level 0 start with the stem. layers: residual blocks.
    width: channels. stride: pixels per side of a token. feature: index of timm's feature map at its end.
    """

    parts: tuple[str, ...]
    layers: int
    width: int
    stride: int
    feature: int


@dataclass(frozen=True)
class Pyramid:
    """A timm pyramid on the meta device and its levels. channels_last: maps are (B, h, w, C), else (B, C, h, w)."""

    model: nn.Module
    levels: tuple[Level, ...]
    channels_last: bool
    family: ArchitectureFamily

    @property
    def norm_path(self) -> str | None:
        """Module path of the final norm of the whole model, if it has one."""
        return self.family.norm and self.family.norm.format(len(self.levels) - 1)


def decompose_levels(name: str, args: Mapping[str, Any]) -> Pyramid:
    """timm's `name`, built with `args`, as levels. Raises ValueError if timm refuses it, or it is no chain of levels."""
    model = build_on_meta(name, args)
    class_name = type(model).__name__
    not_a_chain = ValueError(
        f"backbone '{name}' is timm's {class_name}, which cannot be cut into blocks: timm does not give its feature maps as "
        "a chain of modules; choose a ViT such as 'vit_small_patch16_224' or a pyramid such as "
        "'swin_tiny_patch4_window7_224', 'pvt_v2_b2', 'convnext_tiny' or 'resnet50'"
    )
    try:
        net = build_on_meta(name, args, features_only=True)
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
    return Pyramid(
        model, levels, str(net.output_fmt.value) == "NHWC", FAMILIES.get(class_name, ArchitectureFamily())
    )


def chain_paths(model: nn.Module, nested: bool) -> Iterator[str]:
    """Paths of a model's parts in the order of use; with `nested`, of those inside its Sequentials, as in timm."""
    for name, module in model.named_children():
        if nested and isinstance(module, nn.Sequential):
            yield from (f"{name}.{inner}" for inner, _ in module.named_children())
        else:
            yield name


def read_levels(
    model: nn.Module, paths: Sequence[str], infos: Sequence[Mapping[str, Any]]
) -> Iterator[Level]:
    """The levels of a chain, from timm's `feature_info`.

    A feature map before the first layer (of a ResNet's stem) is no level. Raises ValueError if the strides do not nest, or
    `feature_info` does not fit the chain.
    """
    start, last_stride = 0, 0
    for number, info in enumerate(infos):
        end = paths.index(info["module"]) + 1
        layers = count_layers(model.get_submodule(info["module"]))
        if layers == 0 and start == 0:
            continue
        stride = int(info["reduction"])
        if end <= start or (last_stride and stride % last_stride):
            raise ValueError(f"its feature map {number} has stride {stride} after one of {last_stride}")
        yield Level(tuple(paths[start:end]), max(layers, 1), int(info["num_chs"]), stride, number)
        start, last_stride = end, stride
    if not start:
        raise ValueError("it has no level with layers")


def count_layers(module: nn.Module) -> int:
    """Layers of a level: its `blocks`, the members of a Sequential, or children of one class; else 0."""
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        return len(blocks)
    children = list(module.children())
    have_one_class = len({type(child) for child in children}) == 1
    return len(children) if isinstance(module, nn.Sequential) or have_one_class else 0


def check_maps(pyramid: Pyramid, size: tuple[int, int]) -> None:
    """Raises ValueError if the chain does not turn images of `size` into maps of the shapes of timm's `feature_info`.

    Runs it on the meta device.
    """
    with forked_rng("maps"), torch.inference_mode(), torch.device("meta"):
        x = torch.empty(1, 3, *size)
        model = pyramid.model.eval()
        for level in pyramid.levels:
            expected = (size[0] // level.stride, size[1] // level.stride, level.width)
            try:
                x = run_chain(model.get_submodule, level.parts, x)
                shape = tuple(x.shape[1:] if pyramid.channels_last else x.permute(0, 2, 3, 1).shape[1:])
            except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"level at stride {level.stride} fails ({reason})") from error
            if shape != expected:
                raise ValueError(f"the map at stride {level.stride} is {shape}, not {expected}")


def first_entries(args: Mapping[str, Any], keys: Sequence[str], levels: int, count: int) -> dict[str, Any]:
    """Keywords of a model of the first `count` of its `levels`: lists of `keys` with one entry per level are cut."""
    return {
        key: list(value)[:count]
        if key in keys and isinstance(value, list | tuple) and len(value) == levels
        else value
        for key, value in args.items()
    }
