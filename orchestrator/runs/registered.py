"""Names of targets and decoders: the project's own, and those that plugins register. Those of plugins are tried once.

Their code is the user's, so what is wrong with it is reported in a sentence before anything starts.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch

from bim.models.backbones.backbone import Backbone, BlockInfo
from bim.models.backbones.timm_models import registering_module
from bim.models.decoders import BUILT_IN_DECODERS, DECODERS, decoder_class
from bim.models.seeding import generator
from bim.models.targets import BUILT_IN_TARGETS, TARGETS
from bim.orchestrator.config.messages import format_value, join_or
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.data.source import BUILT_IN_SOURCES, SOURCES
from bim.orchestrator.text import first_line
from bim.orchestrator.training.build import build_decoder, mask_plans
from bim.orchestrator.training.spec import PretrainSpec, TargetSpec

Check = Callable[[], object]


def name_problems(settings: Settings) -> list[str]:
    """One sentence for every name that nothing registers, with the nearest one, or that no other process would know.

    A model that timm does not know is refused where it is opened, and a data source where it is.
    """
    known = {"target.name": list(TARGETS), "decoder.name": ["auto", *DECODERS]}
    unknown = [
        _unknown(key, name, names)
        for key, names in known.items()
        for name in dict.fromkeys(settings.per_block(key))
        if name not in names
    ]
    if settings.plugins or settings.placement.backend == "in_process":
        return unknown
    return unknown + [
        f"{key} '{name}' is registered in this process alone, and stages are processes of their own: register it in a "
        "module that --plugins names, or set placement.backend to in_process"
        for key, name in _own_names(settings)
    ]


def _own_names(settings: Settings) -> Iterator[tuple[str, str]]:
    """Key and name of everything that the settings name and that the project does not bring."""
    for key, table, built_in in (
        ("target.name", TARGETS, BUILT_IN_TARGETS),
        ("decoder.name", DECODERS, BUILT_IN_DECODERS),
    ):
        for name in dict.fromkeys(settings.per_block(key)):
            if name in table and name not in built_in:
                yield key, name
    scheme = settings.data.source.partition(":")[0]
    if scheme in SOURCES and scheme not in BUILT_IN_SOURCES:
        yield "data.source", settings.data.source
    name = settings.backbone.name
    if timm.is_model(name) and registering_module(name) is not None:
        yield "backbone.name", name


def _unknown(key: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:100], known, n=1)
    hint = (
        f"did you mean '{near[0]}'?" if near else "what a module of your own registers needs --plugins MODULE"
    )
    return f"{key} must be {join_or(known)}, not {format_value(name)}; {hint}"


def target_args(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that the target of this name declares as keywords."""
    declared = inspect.signature(TARGETS[name]).parameters
    return {key: value for key, value in settings.items() if key in declared}


def encoding_check(name: str, backbone: Backbone) -> None:
    """Raises ValueError for a decoder that is for other encoders than those of the backbone."""
    encode = getattr(decoder_class(name, backbone.encode), "encode", backbone.encode)
    if encode != backbone.encode:
        raise ValueError(
            f"decoder.name '{name}' is for blocks that encode {encode} tokens, and those of '{backbone.name}' encode "
            f"{backbone.encode} here; give another decoder, or set mask.encode"
        )


def registered_checks(spec: PretrainSpec, backbone: Backbone) -> Iterator[Check]:
    """Tries of every target and decoder of a plugin on one image; they raise ValueError."""
    tried: set[object] = set()
    for info, target, decoder in zip(backbone.blocks, spec.targets, spec.decoders, strict=True):
        is_built_in = target.name in BUILT_IN_TARGETS, decoder.name in BUILT_IN_DECODERS
        sort = (target.name, str(target.args), decoder, info.stride, info.width)
        if all(is_built_in) or sort in tried:
            continue
        tried.add(sort)
        if not is_built_in[0]:
            yield partial(_try_target, target, info, backbone)
        if not is_built_in[1]:
            yield partial(_try_decoder, spec, info, backbone)


@torch.no_grad()
def _try_target(spec: TargetSpec, info: BlockInfo, backbone: Backbone) -> None:
    images = torch.randn(1, 3, *backbone.image_size, generator=generator("try"))
    tokens = info.grid[0] * info.grid[1]
    try:
        target = TARGETS[spec.name](info.stride, **spec.args)
        _, _ = map(float, target.head_init)
        values = target(images)
        picture = target.to_image(values, images)
        shapes = tuple(values.shape), tuple(picture.shape)
        expected = (1, tokens, target.out_dim), tuple(images.shape)
    except Exception as error:
        raise ValueError(
            f"target.name '{spec.name}' fails on an image of {backbone.image_size[0]} x {backbone.image_size[1]} pixels "
            f"with tokens of {info.stride} pixels: {type(error).__name__}: {first_line(error)}"
        ) from error
    if shapes != expected:
        raise ValueError(
            f"target.name '{spec.name}' gives values of shape {shapes[0]} and a picture of {shapes[1]} for one image, where "
            f"{expected[0]}, (images, tokens, out_dim), and {expected[1]} are needed"
        )


@torch.no_grad()
def _try_decoder(spec: PretrainSpec, info: BlockInfo, backbone: Backbone) -> None:
    name = spec.decoders[info.index].name
    try:
        out_dim = TARGETS[spec.targets[info.index].name](info.stride, **spec.targets[info.index].args).out_dim
        plan = mask_plans(spec, backbone, backbone.image_size, 1, 0, 0, [info.index])[info.index]
        decoder = build_decoder(spec, info, backbone, out_dim)
        visible = info.grid[0] * info.grid[1] if backbone.encode == "all" else plan.keep_tokens.shape[1]
        tokens = torch.randn(1, info.num_prefix_tokens + visible, info.width, generator=generator("try"))
        shape = tuple(decoder(tokens, plan).shape)
        norm_shape = tuple(decoder.norm.weight.shape)
    except Exception as error:
        raise ValueError(
            f"decoder.name '{name}' fails in block {info.index} with one image: {type(error).__name__}: {first_line(error)}"
        ) from error
    allowed = [(1, plan.masked.shape[1], out_dim), (1, plan.decode.shape[1], out_dim)]
    if shape not in allowed:
        raise ValueError(
            f"decoder.name '{name}' gives predictions of shape {shape} in block {info.index} for one image, where "
            f"{allowed[0]}, (images, masked tokens, values), is needed"
        )
    if norm_shape != (info.width,):
        raise ValueError(
            f"decoder.name '{name}': its `norm` has {norm_shape} weights; it becomes the final norm of the model and must "
            f"be a LayerNorm of the width of its block, {info.width}"
        )
