"""Backbone families: timm models cut into blocks. To add one: a class in a file, a line in `BACKBONES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bim.models.backbones.backbone import Backbone, BlockInfo, check_name, look_at, random_variant
from bim.models.backbones.dense import DenseBackbone
from bim.models.backbones.swin import SwinBackbone
from bim.models.backbones.twins import TwinsBackbone
from bim.models.backbones.vit import ViTBackbone

# By the class that timm builds; every other is opened as a pyramid, or refused.
BACKBONES: dict[str, type[ViTBackbone] | type[DenseBackbone] | type[SwinBackbone] | type[TwinsBackbone]] = {
    "VisionTransformer": ViTBackbone,
    "SwinTransformer": SwinBackbone,
    "Twins": TwinsBackbone,
}
# Those that have another family where every token is encoded.
PAINTED = {"SwinTransformer": DenseBackbone}
ENCODE = ("auto", "visible", "all")


def open_backbone(
    name: str,
    blocks: int | Sequence[int],
    model_args: Mapping[str, Any] = MappingProxyType({}),
    encode: str = "auto",
) -> Backbone:
    """The timm model `name` with keyword overrides `model_args`, cut into `blocks` (how many, or their sizes
    in layers).

    encode: "visible", blocks see the tokens of visible units only (MAE); "all", every token, the masked units
    painted over in the image (SimMIM, FastMIM); "auto", visible where the family can, else all.

    Quick: looks at the model on the meta device. Raises ValueError, with what to do, for an unknown name or
    override, a model that no family can cut or not for that `encode`, block sizes that do not fit the depth, an
    image size that does not fit the patch.
    """
    if encode not in ENCODE:
        raise ValueError(f"mask.encode is '{encode}'; it must be one of {', '.join(ENCODE)}")
    check_name(name)
    kind = type(look_at(name, {})).__name__
    family = BACKBONES.get(kind, DenseBackbone)
    if encode == "all":
        family = PAINTED.get(kind, family)
    return family(name, blocks, model_args, encode)


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
