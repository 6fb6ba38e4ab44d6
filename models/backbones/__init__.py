"""Backbones: timm models cut into blocks. To add an architecture family: a class in a file and a line in `BACKBONES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bim.models.backbones.backbone import Backbone, BlockInfo, random_variant
from bim.models.backbones.dense import DenseBackbone
from bim.models.backbones.swin import SwinBackbone
from bim.models.backbones.timm_models import build_on_meta, check_name
from bim.models.backbones.twins import TwinsBackbone
from bim.models.backbones.vit import ViTBackbone

# By the class that timm builds; other classes are opened as pyramids, or refused.
BACKBONES: dict[str, type[ViTBackbone | DenseBackbone | SwinBackbone | TwinsBackbone]] = {
    "VisionTransformer": ViTBackbone,
    "SwinTransformer": SwinBackbone,
    "Twins": TwinsBackbone,
}
# Classes that have another backbone where every token is encoded.
ENCODING_ALL: dict[str, type[DenseBackbone]] = {"SwinTransformer": DenseBackbone}
ENCODE = ("auto", "visible", "all")


def open_backbone(
    name: str,
    blocks: int | Sequence[int],
    model_args: Mapping[str, Any] = MappingProxyType({}),
    encode: str = "auto",
) -> Backbone:
    """The timm model `name` with keyword overrides `model_args`, cut into `blocks` (their number, or their sizes in
    layers).

    encode: "visible", blocks see the tokens of visible units only (MAE); "all", every token, a color filling masked units
    of the image (SimMIM, FastMIM); "auto", visible where the backbone supports it, else all.

    It builds the model on the meta device only. Raises ValueError, with what to do, for an unknown name or override, a
    model that cannot be cut at all or not for that `encode`, block sizes that do not fit the depth, an image size that does
    not fit the mask unit.
    """
    if encode not in ENCODE:
        raise ValueError(f"mask.encode is '{encode}'; it must be one of {', '.join(ENCODE)}")
    check_name(name)
    class_name = type(build_on_meta(name, {})).__name__
    backbone_class = BACKBONES.get(class_name, DenseBackbone)
    if encode == "all":
        backbone_class = ENCODING_ALL.get(class_name, backbone_class)
    return backbone_class(name, blocks, model_args, encode)


__all__ = [
    "BACKBONES",
    "ENCODE",
    "Backbone",
    "BlockInfo",
    "DenseBackbone",
    "SwinBackbone",
    "TwinsBackbone",
    "ViTBackbone",
    "open_backbone",
    "random_variant",
]
