"""timm models by name and keyword overrides: checks of both, and models on the meta device.

Settings are validated on the meta device in a fraction of a second, before anything starts.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint
from torch import nn

from bim.models.initialization import NoInitialization
from bim.models.seeding import forked_rng

# Keywords that users cannot set, and why: the project needs a fixed value or has a setting of its own.
RESERVED_ARGS = {
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
    "weight_init": "blocks are initialized as in MAE, or by init_from",
    "fix_init": "blocks are initialized as in MAE, or by init_from",
    "embed_layer": "it takes a class, which a model's config.json cannot name",
    "block_fn": "it takes a class, which a model's config.json cannot name",
    "mlp_layer": "it takes a class, which a model's config.json cannot name",
    "strict_img_size": "images of every size are accepted",
    "head_norm_first": "the decoder's norm becomes the final norm",
    "head_hidden_size": "a variant has no classifier",
    "drop_block_rate": "pretraining uses no dropout",
    "device": "placement is a setting of its own",
    "dtype": "optim.precision sets it",
}

# Keywords of timm's factory, not of a model: they change the kind of model or load weights.
FACTORY_ARGS = frozenset(
    {"features_only", "out_indices", "feature_cls", "pretrained", "pretrained_strict", "scriptable"}
)

# Types of timm's keywords that are checked, with their names in messages.
SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def check_name(name: str) -> None:
    """Raises ValueError, with the three nearest names, if `name` is not registered with timm (with or without a tag)."""
    if timm.is_model(name) and ":" not in name:
        if "." not in name and _has_no_cfg(name):
            return
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
    raise ValueError(f"unknown backbone '{name}'; the nearest timm names are {', '.join(map(repr, nearest))}")


def create_model(name: str, **keywords: Any) -> Any:
    """`timm.create_model` without pretrained weights; a model that has no pretrained configuration gets timm's defaults.

    Raises ValueError for a model that timm could not open again from a folder, beside what timm raises.
    """
    if _has_no_cfg(name):
        # Given explicitly, since timm warns at every model that it makes without one.
        keywords["pretrained_cfg"] = PretrainedCfg(architecture=name)
    model = timm.create_model(name, pretrained=False, **keywords)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"its function in {model_entrypoint(name).__module__} makes the model by itself, so timm could not load weights "
            "into it; let timm.models.build_model_with_cfg make it"
        )
    return model


def _has_no_cfg(name: str) -> bool:
    """Whether it is a model of the user's own without a pretrained configuration."""
    return registering_module(name) is not None and get_pretrained_cfg(name.partition(".")[0]) is None


def registering_module(name: str) -> str | None:
    """The module that registers `name` with timm, which has to be imported before timm opens the model; None: timm."""
    module: str = model_entrypoint(name.partition(".")[0]).__module__
    return None if module.partition(".")[0] == "timm" else module


def build_on_meta(name: str, overrides: Mapping[str, Any], **fixed: Any) -> Any:
    """The timm model on the meta device: its class and sizes without memory.

    overrides: the user's keywords, fixed: the project's. Raises ValueError if timm refuses them.
    """
    try:
        # Nothing is drawn on the meta device, but some constructors draw a constant on the CPU.
        with forked_rng("meta"), torch.device("meta"), NoInitialization():
            return create_model(name, **overrides, **fixed)
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
    """Raises ValueError if an override is unknown to the class, reserved, or cannot be written to config.json."""
    parameters = inspect.signature(model_class).parameters
    accepted = set(parameters) - set(RESERVED_ARGS)
    # Some classes also take the keywords of a config record, which timm itself checks.
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in args.items():
        if key in RESERVED_ARGS:
            raise ValueError(
                f"backbone.model_args: '{key}' cannot be set, since {RESERVED_ARGS[key]}; leave it out"
            )
        if key not in accepted and not (open_ended and key not in FACTORY_ARGS):
            nearest = difflib.get_close_matches(key, accepted, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"it takes {', '.join(sorted(accepted))}"
            raise ValueError(f"backbone.model_args: '{name}' takes no '{key}'; {hint}")
        if value is None:
            raise ValueError(f"backbone.model_args: '{key}' is null, which timm ignores; leave it out")
        annotation = parameters[key].annotation if key in parameters else None
        if annotation in SCALARS and type(value) not in (
            (int, float) if annotation is float else (annotation,)
        ):
            raise ValueError(f"backbone.model_args: '{key}' is {value!r}; it must be {SCALARS[annotation]}")
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"backbone.model_args: '{key}' is {value!r}, which cannot be written to config.json; "
                "use numbers, strings, booleans and lists"
            ) from None


def split_image_size(model: Any, args: Mapping[str, Any]) -> tuple[tuple[int, int], dict[str, Any]]:
    """`img_size` of `args` as (height, width), by default the model's pretraining size, and the other keywords.

    Raises ValueError if it is neither a whole number nor two of them.
    """
    size = args.get("img_size", model.pretrained_cfg["input_size"][-2:])
    pair = [size, size] if type(size) is int else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(side) is not int for side in pair):
        raise ValueError(
            f"backbone.model_args: 'img_size' is {size!r}; it must be a whole number or [height, width]"
        )
    return (pair[0], pair[1]), {key: value for key, value in args.items() if key != "img_size"}
