"""The backbones and image sizes that automatic settings choose from, by the rules of `config/auto.yaml`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from bim.orchestrator.config.auto_rules import AutoRules, BackboneRule, Device
from bim.orchestrator.data.facts import ImageFacts

IMG_SIZE = "backbone.model_args.img_size"


@dataclass(frozen=True)
class Candidate:
    """A backbone at an image size; None: what the user gave, or timm's own size."""

    backbone: BackboneRule | None
    size: int | None


def is_given(key: str, given: Mapping[str, Any]) -> bool:
    """Whether the user set a key, a part of it, or what it is a part of; given: dotted keys."""
    return any(other == key or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in given)


def candidates(
    rules: AutoRules, facts: ImageFacts, device: Device, given: Mapping[str, Any], train: int
) -> Iterator[Candidate]:
    """The largest backbone and image size first; then size and backbone shrink in turns.

    train: number of training images.
    """
    rule, most = rules.image_size, rules.image_size.max[device]
    fitting = [size for size in rule.sizes if size <= min(most, facts.short_side_px)]
    sizes: list[int | None] = list(reversed(fitting)) or [min(rule.sizes)]
    backbones: list[BackboneRule | None] = [
        row for row in reversed(rules.backbones) if row.device == device and row.min_images <= train
    ]
    if is_given("backbone.name", given) or is_given("backbones", given):
        backbones, sizes = [None], [None]
    elif IMG_SIZE in given:
        sizes = [max(_sides(given[IMG_SIZE]))]
    size, backbone = 0, 0
    yield Candidate(backbones[0], sizes[0])
    for _ in zip_longest(sizes, backbones):
        if size + 1 < len(sizes):
            size += 1
            yield Candidate(backbones[backbone], sizes[size])
        if backbone + 1 < len(backbones):
            backbone += 1
            yield Candidate(backbones[backbone], sizes[size])


def candidate_values(candidate: Candidate, rules: AutoRules, given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of the settings that a candidate stands for and the user has not given."""
    backbone, size = candidate.backbone, candidate.size
    if is_given("backbones", given):
        return {"decoder.dim": 256}
    if backbone is None or size is None:
        return {"backbone.model_args": {}, "decoder.dim": 256}
    patch = next((row.patch for row in rules.patch_size if size <= row.max_size), rules.patch_size[-1].patch)
    scale = next((row.scale for row in rules.crop_scale if size <= row.max_size), rules.crop_scale[-1].scale)
    width, blocks = given.get("backbone.model_args.embed_dim", backbone.width), given.get("blocks")
    values: dict[str, Any] = {
        "backbone.name": backbone.name,
        "backbone.model_args.img_size": size,
        "backbone.model_args.patch_size": _dividing(patch, _sides(given.get(IMG_SIZE, size))),
        "backbone.model_args.embed_dim": backbone.width,
        "backbone.model_args.depth": sum(blocks) if isinstance(blocks, Sequence) else backbone.depth,
        "backbone.model_args.num_heads": _heads(width, backbone.width // backbone.heads),
        "decoder.dim": backbone.decoder_dim,
        "data.crop_scale": list(scale),
    }
    return {key: value for key, value in values.items() if not is_given(key, given)}


def _sides(size: Any) -> tuple[int, ...]:
    """Of an image size as timm takes it: a number, or height and width."""
    return tuple(map(int, size)) if isinstance(size, Sequence) else (int(size),)


def _dividing(patch: int, sides: Sequence[int]) -> int:
    """The largest patch size, at most `patch`, that divides all sides; `patch` itself where only tiny ones do."""
    common = math.gcd(*sides)
    dividing = max(size for size in range(1, patch + 1) if common % size == 0)
    return dividing if dividing > patch // 2 else patch


def _heads(width: Any, head_width: int) -> int:
    """The most attention heads of at least `head_width` channels that divide a width."""
    most = max(1, int(width) // head_width)
    return max(heads for heads in range(1, most + 1) if int(width) % heads == 0)
