"""The settings of a run: typed, frozen, complete before anything starts. The only place that uses pydantic.

Checks what can be checked without the backbone and the data; `resolve.py` and the data sources do the rest. A
wrong setting is a `SettingsError` whose lines each name a key, its value and what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bim.orchestrator.config.messages import SettingInfo, explain, group_titles, setting_infos, show


class SettingsError(ValueError):
    """One or more settings are wrong; one clear sentence a line."""


def _tuple_if_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _home(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _path_if_text(value: object) -> object:
    return Path(os.path.expanduser(value)) if isinstance(value, str) and value else value


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
HeldOut = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Location = Annotated[str, BeforeValidator(_home), Field(min_length=1)]
OutPath = Annotated[Path, BeforeValidator(_path_if_text)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
Shares = Annotated[tuple[Share, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
TwoShares = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
    BeforeValidator(_tuple_if_list),
]
HeldOuts = Annotated[tuple[HeldOut, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
TargetName = Literal["pixels", "hog"]
TargetNames = Annotated[tuple[TargetName, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
Phase = Annotated[tuple[int | float, ...], BeforeValidator(_tuple_if_list), Field(min_length=2, max_length=4)]
Phases = Annotated[tuple[Phase, ...], BeforeValidator(_tuple_if_list), Field(min_length=1)]
Betas = Annotated[tuple[HeldOut, HeldOut], BeforeValidator(_tuple_if_list)]
SearchValues = list[Any] | dict[str, bool | int | float] | None
_Plain = bool | int | float | str
ModelArg = _Plain | list[_Plain | list[_Plain]] | None  # timm's window_size: [[4, 4], [8, 8]]


def _search_space(value: object) -> object:
    """Raises ValueError for single values, in words that name the key."""
    if isinstance(value, dict):
        problems = [
            f"search.space: {key} must be a list of values to try, or {{low: a, high: b}}, not {show(tried)}; "
            f"to set it without a search give --{key} {show(tried)}"
            for key, tried in value.items()
            if not (tried is None or isinstance(tried, list | dict))
        ]
        if problems:
            raise ValueError("\n".join(problems))
    return value


SearchSpace = Annotated[dict[str, SearchValues], BeforeValidator(_search_space)]


class _Group(BaseModel):
    # Strict: "4" in a file is text, True is no number. Lists become tuples, text a path, where declared.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


class BackboneSettings(_Group):
    name: Text = Field(description="timm name; a new name drops the recipe's model_args")
    model_args: dict[str, ModelArg] = Field(
        default_factory=dict,
        description="timm keywords; one by one: --backbone.model_args.depth 8",
        examples=[{"img_size": 128, "depth": 8}],
    )


class BackboneEntry(_Group):
    """One of several backbones: what it has of its own; everything else is the run's."""

    name: Text = Field(description="timm name")
    model_args: dict[str, ModelArg] | None = Field(
        default=None,
        description="timm keywords; null: timm's own values",
        examples=[{"img_size": 128, "depth": 8}],
    )
    blocks: Count | Counts | None = Field(
        default=None, description="null: as in the run", examples=[4, [2, 2, 6, 2]]
    )
    called: Word | None = Field(
        default=None, description="its folder and its name in tables; null: its timm name"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="other settings of its own, by dotted key",
        examples=[{"optim.blr": 1.0e-3, "decoder.dim": 128}],
    )


def _backbone_entries(value: object) -> object:
    """Names joined by commas, or a list of names and mappings. Raises ValueError in words that name the entry."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list):
        return value
    infos, found, problems = setting_infos(BackboneEntry.model_json_schema()), [], []
    for number, entry in enumerate(value, 1):
        given = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict):
            problems.append(f"backbones: entry {number} must be a timm name or a mapping, not {show(entry)}")
            continue
        try:
            found.append(BackboneEntry.model_validate(given))
        except ValidationError as error:
            said = explain(error.errors(), given, infos)
            problems += [f"backbones: entry {number}: {text}" for _, text in said]
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(found)


BackboneEntries = Annotated[
    tuple[BackboneEntry, ...], BeforeValidator(_backbone_entries), Field(min_length=1)
]


class MaskSettings(_Group):
    ratio: Share | Shares = Field(
        default=(0.6, 0.75),
        description="share of mask units hidden: one for all blocks, [of the first, of the last] with even steps between, "
        "or one for each block; must not decrease. Where all tokens are encoded, of two the last holds for all",
        examples=[0.75, [0.6, 0.75]],
    )
    encode: Literal["auto", "visible", "all"] = Field(
        default="auto",
        description="visible: masked units are never computed (MAE); all: they are painted over (FastMIM); auto: visible "
        "where the backbone can",
    )
    per_batch: bool | None = Field(
        default=None,
        description="one mask for all images of a batch; null: for Swin and Twins on visible tokens, where one per image "
        "costs the host much time (docs/benchmarks.md)",
    )
    sweep_groups: bool = Field(
        default=False,
        description="Swin and Twins: try every size of window groups, in place of the published rule; dearer for the host",
    )
    score_newly_dropped: bool = Field(default=True, description="later blocks also predict what block 0 saw")


class DecoderSettings(_Group):
    depth: Count | Counts = Field(default=1, description="layers", examples=[1, [1, 1, 2, 2]])
    dim: Count | Counts = Field(default=256, description="width", examples=[256, [128, 128, 256, 256]])
    num_heads: Count | Counts | None = Field(
        default=None, description="attention heads; null: one per 32 of width", examples=[8, [4, 4, 8, 8]]
    )
    throw_ratio: HeldOut | HeldOuts = Field(
        default=0.0,
        description="share of all tokens that no decoder layer sees (PR-MIM); 0: none",
        examples=[0.5, [0.5, 0.5, 0.25, 0.25]],
    )
    recovery: Literal["aggregate", "none"] = Field(
        default="aggregate",
        description="thrown tokens are recovered from decoded neighbours, or not predicted",
    )
    sampler: Literal["furthest", "furthest_from_visible", "random", "cells"] = Field(
        default="furthest", description="how the masked tokens that are decoded are chosen"
    )
    thrown_weight: Positive = Field(
        default=1.0, description="of a recovered token in the loss; of a decoded one: 1"
    )


class TargetSettings(_Group):
    name: TargetName | TargetNames = Field(
        default="pixels",
        description="what a decoder predicts of a masked token: its pixels, or HOG (FastMIM)",
        examples=["hog", ["hog", "hog", "pixels", "pixels"]],
    )
    normalize: bool = Field(
        default=True, description="pixels by their token's mean and deviation; HOG by its cell's length"
    )
    cell: Count | Counts = Field(
        default=8, description="side of a HOG cell in pixels", examples=[8, [4, 8, 16, 32]]
    )
    bins: Count = Field(default=9, description="orientations of a HOG cell")


class DataSettings(_Group):
    source: Location = Field(description="digits, a path, or torchvision:NAME[:ROOT]")
    image_column: Text | None = Field(default=None, description="of Parquet; null: found by its type")
    label_column: Text | None = Field(default=None, description="of Parquet; null: 'label' if there is one")
    batch_size: Count = Field(description="images per micro-batch of the whole run, not per GPU")
    accumulate: Count = Field(default=1, description="micro-batches per optimizer step")
    workers: Annotated[int, Field(ge=0)] = Field(default=2, description="loading processes; 0: load in place")
    crop_scale: TwoShares = Field(
        default=(0.2, 1.0), description="random resized crop, share of the area", examples=[[0.2, 1.0]]
    )
    flip: bool = Field(default=True, description="mirror half of the training images")
    val_fraction: HeldOut = Field(default=0.1, description="share of images held out for validation")
    test_fraction: HeldOut = Field(default=0.2, description="share of images held out for the final scores")
    split_seed: Seed = Field(default=0, description="seed of the three splits, apart from --seed")
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="stop above this share of unreadable images"
    )


class ScheduleSettings(_Group):
    epochs: Count = Field(description="passes over the training split")
    warmup_epochs: NotNegative = Field(default=0.0, description="linear, from 0; a cosine to 0 follows")
    resolution: Phases | None = Field(
        default=None,
        description="[from, pixels] or [from, pixels, batch_size, accumulate]: training size from an epoch or a share of "
        "the run on; null: the backbone's own",
        examples=[[[0, 128], [0.5, 160], [0.75, 192]]],
    )


class OptimSettings(_Group):
    blr: Positive = Field(default=1.5e-4, description="lr = blr x batch_size x accumulate / 256")
    weight_decay: NotNegative = Field(default=0.05, description="none on norms, biases and tokens")
    betas: Betas = Field(default=(0.9, 0.95), description="AdamW's", examples=[[0.9, 0.95]])
    clip_grad: Positive | None = Field(
        default=None, description="bound of a block's gradient norm; null: none"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 where the device has it"
    )


class CheckpointSettings(_Group):
    every_epochs: Positive = Field(default=10.0, description="epochs from one checkpoint to the next")
    keep: Count = Field(default=2, description="newest checkpoints that stay on disk")


class EvaluationSettings(_Group):
    knn_k: Count = Field(default=20, description="neighbours of the weighted kNN")
    knn_temperature: Positive = Field(
        default=0.07, description="T in a neighbour's weight, exp(similarity / T)"
    )
    batch_size: Count = Field(default=256, description="images embedded at a time")
    latency: bool = Field(default=True, description="measure ms per forward pass at batch 1 and 64")


class FailureSettings(_Group):
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        default=3, description="times to go back to the last checkpoint"
    )


class PlacementSettings(_Group):
    backend: Literal["ray", "in_process"] = Field(
        default="ray", description="Ray actors, or all in this process"
    )
    stages: Count | None = Field(default=None, description="places for blocks; null: as many as fit")
    gpus_per_stage: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="GPUs, at most 1; 0.5: shared by two; null: as there are"
    )
    cpus_per_stage: NotNegative | None = Field(
        default=None, description="CPU cores asked for; null: as there are"
    )
    threads_per_stage: Count | None = Field(
        default=None, description="torch's CPU threads; null: the stage's cores"
    )
    window: Count | None = Field(default=None, description="micro-batches under way; null: 2 x stages")
    wait_s: NotNegative = Field(default=0.0, description="seconds that an autoscaling cluster gets to grow")


class SearchSettings(_Group):
    trials: Annotated[int, Field(ge=0)] = Field(
        default=0, description="settings that Ray Tune tries before the run; 0: no search"
    )
    resume: bool = Field(default=False, description="continue the search in --out that was cut off")
    space: SearchSpace = Field(
        default_factory=lambda: dict[str, SearchValues].fromkeys(
            ("mask.ratio", "decoder.throw_ratio", "schedule.resolution")
        ),
        description="dotted key: values to try, or {low, high, log} for numbers; null: our own choice",
        examples=[{"mask.ratio": None, "optim.blr": [1.0e-3, 4.0e-3]}],
    )
    trial_epochs: Count | None = Field(
        default=None, description="of a trial that is not stopped early, at most the run's; null: the run's"
    )
    grace_epochs: Count | None = Field(
        default=None,
        description="epochs before a trial may be stopped (ASHA); null: half of its epochs, and its warm-up",
    )
    every_epochs: Count = Field(default=1, description="epochs from one score of a trial to the next")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        default=2, description="ASHA goes on with the best 1 / this share"
    )
    trial_stages: Count | None = Field(
        default=None, description="places for the blocks of a trial; null: as in the run"
    )
    concurrent: Count | None = Field(default=None, description="trials side by side; null: as many as fit")
    searcher: Literal["random", "optuna"] = Field(
        default="random", description="optuna needs: pip install '.[optuna]'"
    )


class TrackingSettings(_Group):
    uri: Text | None = Field(default=None, description="MLflow's store; null: MLflow's own default")
    experiment: Text = Field(default="bim", description="MLflow's experiment")
    model_name: Text | None = Field(default=None, description="registered models; null: named after the run")


class Settings(_Group):
    """Everything that a run depends on. Made by `settings_from_mapping`, or `command_line.load_settings`."""

    name: Word = Field(description="of the run, in MLflow")
    out: OutPath | None = Field(
        default=None, description="output folder; null: a new one, named after the run"
    )
    resume: bool = Field(default=False, description="continue the run in --out from its last checkpoint")
    seed: Seed = Field(default=0, description="of weights, masks, sample order and augmentation")
    init_from: Location | None = Field(
        default=None, description="weights: timm name, timm folder or .safetensors"
    )
    blocks: Count | Counts = Field(
        default=4, description="how many, or the layers of each; 1: ordinary MAE", examples=[4, [3, 3, 3, 3]]
    )
    baseline: Literal["none", "mae"] = Field(
        default="none", description="mae: also one run with blocks 1, cut to every depth"
    )
    boundary_noise: NotNegative = Field(
        default=0.0, description="noise on what enters a later block, in deviations of it; 0: none"
    )
    backbones: BackboneEntries | None = Field(
        default=None,
        description="several backbones side by side, in place of backbone: names joined by commas, or a list of names and "
        "mappings {name, model_args, blocks, called, settings}",
        examples=["vit_small_patch16_224,swin_tiny_patch4_window7_224"],
        json_schema_extra={"allowed": "timm names joined by commas, or a list of names and mappings"},
    )
    backbone: BackboneSettings = Field(description="the timm model that is trained")
    mask: MaskSettings = Field(default_factory=MaskSettings, description="what the encoder does not see")
    decoder: DecoderSettings = Field(
        default_factory=DecoderSettings,
        description="the local decoder of a block; a list has one value per block",
    )
    target: TargetSettings = Field(default_factory=TargetSettings, description="what is predicted")
    data: DataSettings = Field(description="the images, and how they are served")
    schedule: ScheduleSettings = Field(description="how long it trains")
    optim: OptimSettings = Field(default_factory=OptimSettings, description="AdamW, one for every block")
    checkpoint: CheckpointSettings = Field(
        default_factory=CheckpointSettings, description="how much a crash can cost"
    )
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="the scores of every depth"
    )
    failures: FailureSettings = Field(default_factory=FailureSettings, description="when a stage is lost")
    placement: PlacementSettings = Field(
        default_factory=PlacementSettings,
        description="where the blocks live; a stage holds one or several",
    )
    search: SearchSettings = Field(
        default_factory=SearchSettings, description="trials of other settings before the run, by Ray Tune"
    )
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description="the record in MLflow")

    @property
    def num_blocks(self) -> int:
        """How many blocks, however `blocks` was written."""
        return self.blocks if isinstance(self.blocks, int) else len(self.blocks)

    def per_block(self, key: str) -> tuple[Any, ...]:
        """The value of `mask.ratio` (see `ratios_by_block`) or of another setting for every block; one holds for all."""
        group, name = key.split(".")
        value = getattr(getattr(self, group), name)
        if key == "mask.ratio":
            return ratios_by_block(value, self.num_blocks)
        return value if isinstance(value, tuple) else (value,) * self.num_blocks

    @model_validator(mode="before")
    @classmethod
    def _first_of_several(cls, values: Any) -> Any:
        """With several backbones no single one has to be named."""
        single = values.get("backbone") or {} if isinstance(values, dict) else None
        if isinstance(single, dict) and values.get("backbones") and "name" not in single:
            entries = _backbone_entries(values["backbones"])
            if isinstance(entries, tuple) and entries:
                return values | {"backbone": single | {"name": entries[0].name}}
        return values


@cache
def all_settings() -> dict[str, SettingInfo]:
    """Every setting by its dotted key, in the order of --help."""
    return setting_infos(Settings.model_json_schema())


def setting_groups() -> dict[str, str]:
    """Group name -> what it is about, in the order of --help."""
    return group_titles(Settings.model_json_schema())


def ratios_by_block(ratio: float | Sequence[float], blocks: int) -> tuple[float, ...]:
    """What `mask.ratio` means: one number holds for all blocks, two are the first block's and the last one's, with even
    steps between (a single block has the last), others are listed."""
    if not isinstance(ratio, Sequence):
        return (ratio,) * blocks
    if len(ratio) != 2:
        return tuple(ratio)
    first, last = ratio
    return tuple(round(last + (first - last) * k / max(blocks - 1, 1), 4) for k in reversed(range(blocks)))


def start_epoch(start: float, epochs: int) -> int:
    """The epoch with which a phase begins: a whole number is one, a fraction is a share of the run."""
    return start if isinstance(start, int) else round(start * epochs)
