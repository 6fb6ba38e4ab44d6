"""The rules of automatic settings as records, read from `auto.yaml` beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bim.orchestrator.config.durations import seconds
from bim.orchestrator.config.recipes import parse_value

Device = Literal["cpu", "gpu"]


class _Rules(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SizeRule(_Rules):
    sizes: tuple[int, ...]
    max: Mapping[Device, int]


class PatchRule(_Rules):
    max_size: int
    patch: int


class CropRule(_Rules):
    max_size: int
    scale: tuple[float, float]


class BackboneRule(_Rules):
    """A plain ViT; `min_images` of the training split from which on it is taken."""

    name: str
    width: int
    depth: int
    heads: int
    decoder_dim: int
    min_images: int
    device: Device


class StepsRule(_Rules):
    min_per_epoch: int
    images_per_step: Mapping[Device, int]


class EpochsRule(_Rules):
    images: int
    min: int
    max: int
    warmup_fraction: float
    max_warmup: int
    round_to: int


class RateRule(_Rules):
    max_images_per_step: int
    lr: float


class SplitRule(_Rules):
    fraction: float
    min_images: int
    max_images: int


class WorkersRule(_Rules):
    per_cpu: Mapping[Device, float]
    max: int


class ScoresRule(_Rules):
    """Scores before the end, at most, and seconds of training between two."""

    most: int = Field(ge=1)
    min_seconds_between: float


class AutoRules(_Rules):
    """Everything of `auto.yaml`; what each part means stands there."""

    always: Mapping[str, Any]
    time_budget: Mapping[Device, str]
    image_size: SizeRule
    patch_size: tuple[PatchRule, ...]
    crop_scale: tuple[CropRule, ...]
    backbones: tuple[BackboneRule, ...]
    steps: StepsRule
    epochs: EpochsRule
    learning_rate: tuple[RateRule, ...]
    splits: Mapping[Literal["test", "val"], SplitRule]
    workers: WorkersRule
    checkpoints: int = Field(ge=1)
    scores: ScoresRule
    few_images: int

    @field_validator("time_budget")
    @classmethod
    def _durations(cls, value: Mapping[Device, str]) -> Mapping[Device, str]:
        for text in value.values():
            seconds(text)
        return value


@cache
def auto_rules() -> AutoRules:
    """The rules that come with the package."""
    text = (resources.files("bim.orchestrator.config") / "auto.yaml").read_text(encoding="utf-8")
    return AutoRules.model_validate(parse_value(text))
