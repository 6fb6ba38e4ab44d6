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

LEAST_SETTINGS: Mapping[str, Any] = {
    "name": "images",
    "backbone": {"name": "vit_tiny_patch16_224"},
    "data": {"source": "images", "batch_size": 1},
    "schedule": {"epochs": 1_000_000},
}
"""Settings that contradict none that is typed: what is typed is checked in them before any is chosen."""

CHOSEN_SETTINGS = (
    "name",
    "backbone.name",
    "backbone.model_args",
    "decoder.dim",
    "data.batch_size",
    "data.accumulate",
    "data.workers",
    "data.crop_scale",
    "data.val_fraction",
    "data.test_fraction",
    "schedule.epochs",
    "schedule.warmup_epochs",
    "optim.blr",
    "checkpoint.every_epochs",
    "evaluation.every_epochs",
)
"""Settings that depend on the images and the machine, beside those of `AutoRules.always`."""


class _Rules(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AlwaysRule(_Rules):
    """Settings of every automatic run, by dotted key, and why; null: their line is printed elsewhere."""

    settings: Mapping[str, Any]
    reason: str | None


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

    always: tuple[AlwaysRule, ...]
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

    @property
    def always_values(self) -> dict[str, Any]:
        """Dotted key -> value of every rule of `always`."""
        return {key: value for rule in self.always for key, value in rule.settings.items()}

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
