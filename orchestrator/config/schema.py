"""The settings of a run: typed, frozen, complete before anything starts.

Checks what can be checked without the backbone and the data; `runs/resolve.py` and the data sources
do the rest. Each line of a `SettingsError` names a key, its value and what is allowed.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bim.orchestrator.config.backbone_entry import BackboneEntries, parse_backbone_entries
from bim.orchestrator.config.field_types import (
    BatchSize,
    Betas,
    Count,
    Counts,
    CropScale,
    DecoderNames,
    Fraction,
    Fractions,
    HeldOut,
    HeldOuts,
    Identifier,
    Location,
    ModelArg,
    ModuleNames,
    NotNegative,
    OutPath,
    Phases,
    Positive,
    SearchSpace,
    SearchValues,
    Section,
    Seed,
    StorageUrl,
    TargetNames,
    Text,
)
from bim.orchestrator.config.messages import SettingInfo, section_titles, setting_infos
from bim.orchestrator.config.short_forms import ratios_by_block


class SettingsError(ValueError):
    """One or more settings are wrong; one clear sentence a line."""


class BackboneSettings(Section):
    name: Text = Field(description="timm name; a new name drops the recipe's model_args")
    model_args: dict[str, ModelArg] = Field(
        default_factory=dict,
        description="timm keywords; one by one: --backbone.model_args.depth 8",
        examples=[{"img_size": 128, "depth": 8}],
    )


class MaskSettings(Section):
    ratio: Fraction | Fractions = Field(
        default=(0.6, 0.75),
        description="fraction of mask units hidden: one for all blocks, [first block, last block] with even steps between, "
        "or one per block; must not decrease. Where all tokens are encoded, the last value holds for all blocks",
        examples=[0.75, [0.6, 0.75]],
    )
    encode: Literal["auto", "visible", "all"] = Field(
        default="auto",
        description="visible: the encoder skips masked units (MAE); all: it sees them as mask tokens (FastMIM, SimMIM); "
        "auto: visible where the backbone supports it",
    )
    per_batch: bool | None = Field(
        default=None,
        description="one mask for all images of a batch; null: true for Swin and Twins on visible tokens, where one "
        "mask per image costs much host time",
    )
    sweep_groups: bool = Field(
        default=False,
        description="Swin and Twins: try every window group size instead of the published rule; more host time",
    )
    loss_on_newly_masked: bool = Field(
        default=True, description="later blocks also predict the mask units that block 0 saw"
    )


class DecoderSettings(Section):
    name: DecoderNames = Field(
        default="auto",
        description="auto: local (MAE) where blocks encode visible tokens, light (FastMIM) where all; or one that a plugin "
        "registers",
    )
    depth: Count | Counts = Field(
        default=1, description="layers of a local decoder", examples=[1, [1, 1, 2, 2]]
    )
    dim: Count | Counts = Field(
        default=256, description="width of a local decoder", examples=[256, [128, 128, 256, 256]]
    )
    num_heads: Count | Counts | None = Field(
        default=None, description="attention heads; null: one per 32 of width", examples=[8, [4, 4, 8, 8]]
    )
    throw_ratio: HeldOut | HeldOuts = Field(
        default=0.0,
        description="fraction of all tokens that no decoder layer sees (PR-MIM); 0: none",
        examples=[0.5, [0.5, 0.5, 0.25, 0.25]],
    )
    recovery: Literal["none", "aggregate"] = Field(
        default="none",
        description="none: thrown tokens are not predicted; aggregate: they are recovered from decoded neighbors",
    )
    sampler: Literal["furthest", "furthest_from_visible", "random", "cells"] = Field(
        default="furthest", description="choice of the masked tokens to decode"
    )
    thrown_weight: Positive = Field(
        default=1.0, description="loss weight of a recovered token; a decoded one has 1"
    )


class TargetSettings(Section):
    name: TargetNames = Field(
        default="pixels",
        description="what a decoder predicts of a masked token: pixels, HOG (FastMIM), or what a plugin registers",
    )
    normalize: bool = Field(
        default=True, description="pixels by the mean and std of their token; HOG by the norm of its cell"
    )
    cell: Count | Counts = Field(
        default=8, description="side of a HOG cell, pixels", examples=[8, [4, 8, 16, 32]]
    )
    bins: Count = Field(default=9, description="orientation bins of a HOG cell")


class DataSettings(Section):
    source: Location = Field(
        description="digits, a path, torchvision:NAME[:ROOT], or what a plugin registers"
    )
    image_column: Text | None = Field(
        default=None, description="image column of Parquet files; null: found by its type"
    )
    label_column: Text | None = Field(
        default=None, description="label column of Parquet files; null: 'label' if present"
    )
    batch_size: BatchSize = Field(
        description="images per micro-batch, of the whole run, not per GPU; auto: the largest that fits"
    )
    accumulate: Count = Field(default=1, description="micro-batches per optimizer step")
    workers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="data loading processes; 0: load in the loader itself"
    )
    crop_scale: CropScale = Field(
        default=(0.2, 1.0), description="random resized crop, fraction of the area", examples=[[0.2, 1.0]]
    )
    flip: bool = Field(default=True, description="random horizontal flip")
    val_fraction: HeldOut = Field(default=0.1, description="fraction of images held out for validation")
    test_fraction: HeldOut = Field(
        default=0.2, description="fraction of images held out for the final metrics"
    )
    split_seed: Seed = Field(default=0, description="seed of the three splits; independent of seed")
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="stop above this fraction of unreadable images"
    )


class ScheduleSettings(Section):
    epochs: Count = Field(description="passes over the training split")
    warmup_epochs: NotNegative = Field(
        default=0.0, description="epochs of linear warm-up from 0; a cosine to 0 follows"
    )
    resolution: Phases | None = Field(
        default=None,
        description="[start, pixels] or [start, pixels, batch_size, accumulate]: training size from an epoch, or a "
        "fraction of the run, on; null: the backbone's image size",
        examples=[[[0, 128], [0.5, 160], [0.75, 192]]],
    )


class OptimSettings(Section):
    blr: Positive = Field(default=1.5e-4, description="lr = blr x batch_size x accumulate / 256")
    weight_decay: NotNegative = Field(
        default=0.05, description="AdamW weight decay; none on norms, biases and tokens"
    )
    betas: Betas = Field(default=(0.9, 0.95), description="AdamW betas", examples=[[0.9, 0.95]])
    clip_grad: Positive | None = Field(
        default=None, description="maximum gradient norm of a block; null: no clipping"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 where the device has it"
    )


class CheckpointSettings(Section):
    every_epochs: Positive = Field(default=10.0, description="epochs between checkpoints")
    every_minutes: Positive | None = Field(
        default=15.0, description="minutes between checkpoints, beside those by epochs; null: by epochs alone"
    )
    keep: Count = Field(default=2, description="number of newest checkpoints kept")
    storage: StorageUrl | None = Field(
        default=None,
        description="URL below which checkpoints are, where nodes share no folder; s3:// needs: pip install '.[s3]'; "
        "null: in --out",
        examples=["s3://bucket/checkpoints"],
        json_schema_extra={"allowed": "a URL"},
    )


class EvaluationSettings(Section):
    knn_k: Count = Field(default=20, description="neighbors of the weighted kNN")
    knn_temperature: Positive = Field(
        default=0.07, description="temperature T of a neighbor's weight, exp(similarity / T)"
    )
    batch_size: Count = Field(default=256, description="images per forward pass")
    latency: bool = Field(default=True, description="measure ms per forward pass at batch 1 and 64")
    every_epochs: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="epochs between two scores while it trains; 0: none; null: up to ten in a run",
    )
    patience: Count | None = Field(
        default=None,
        description="scores in a row without a better one that end the training; null: all epochs are trained",
    )


class FailureSettings(Section):
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        default=3, description="maximum number of restarts from the last checkpoint"
    )


class PlacementSettings(Section):
    backend: Literal["ray", "in_process"] = Field(
        default="ray", description="ray: one actor per stage; in_process: all stages in this process"
    )
    stages: Count | None = Field(default=None, description="number of pipeline stages; null: as many as fit")
    gpus_per_stage: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="GPUs per stage, at most 1; 0.5: two stages share one; null: as available"
    )
    cpus_per_stage: NotNegative | None = Field(
        default=None, description="CPU cores per stage; null: as available"
    )
    threads_per_stage: Count | None = Field(
        default=None, description="torch CPU threads per stage; null: the cores of the stage"
    )
    window: Count | None = Field(default=None, description="micro-batches in flight; null: 2 x stages")
    wait_s: NotNegative = Field(default=0.0, description="seconds to wait for an autoscaling cluster to grow")


class SearchSettings(Section):
    trials: Annotated[int, Field(ge=0)] = Field(
        default=0, description="number of Ray Tune trials before the run; 0: no search"
    )
    resume: bool = Field(default=False, description="continue the interrupted search in --out")
    space: SearchSpace = Field(
        default_factory=lambda: dict[str, SearchValues].fromkeys(
            ("mask.ratio", "decoder.throw_ratio", "schedule.resolution")
        ),
        description="dotted key: values to try, or {low, high, log} for numbers; null: the built-in space of that key",
        examples=[{"mask.ratio": None, "optim.blr": [1.0e-3, 4.0e-3]}],
    )
    trial_epochs: Count | None = Field(
        default=None, description="epochs of a trial that is not stopped early; null: those of the run"
    )
    grace_epochs: Count | None = Field(
        default=None,
        description="ASHA grace period, epochs; null: half of a trial and its warm-up",
    )
    every_epochs: Count = Field(default=1, description="epochs between two scores of a trial")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        default=2, description="ASHA reduction factor: the best 1 / factor of the trials go on"
    )
    trial_stages: Count | None = Field(
        default=None, description="pipeline stages of a trial; null: as in the run"
    )
    concurrent: Count | None = Field(default=None, description="concurrent trials; null: as many as fit")
    searcher: Literal["random", "optuna"] = Field(
        default="random", description="search algorithm; optuna needs: pip install '.[optuna]'"
    )


class TrackingSettings(Section):
    uri: Text | None = Field(default=None, description="MLflow tracking URI; null: MLflow's default")
    experiment: Text = Field(default="bim", description="MLflow experiment")
    model_name: Text | None = Field(
        default=None, description="name of the registered models; null: named after the run"
    )


class EstimateSettings(Section):
    price_per_gpu_hour: Positive | None = Field(
        default=None, description="price of a GPU for an hour, for the estimate of --dry-run; null: no price"
    )


class Settings(Section):
    """Everything that a run depends on. Made by `validate.settings_from_mapping` or `cli.load_settings`."""

    name: Identifier = Field(description="name of the run in MLflow")
    out: OutPath | None = Field(
        default=None, description="output directory; null: a new one named after the run"
    )
    resume: bool = Field(default=False, description="continue the run in --out from its last checkpoint")
    from_scratch: bool = Field(
        default=False,
        description="with --resume: where no checkpoint can be read, set them aside and begin again at step 0",
    )
    seed: Seed = Field(default=0, description="seed of weights, masks, sample order and augmentation")
    init_from: Location | None = Field(
        default=None,
        description="initial weights: timm name, timm folder or .safetensors; not the same as resume",
    )
    plugins: ModuleNames = Field(
        default=(),
        description="Python modules, imported by every process before anything is built: they register data sources, "
        "targets, decoders and timm models of your own",
    )
    blocks: Count | Counts = Field(
        default=4,
        description="number of blocks, or the layers of each; 1: ordinary MAE",
        examples=[4, [3, 3, 3, 3]],
    )
    baseline: Literal["none", "mae"] = Field(
        default="none",
        description="mae: also train one end-to-end run (blocks 1) and truncate it at every depth",
    )
    boundary_noise: NotNegative = Field(
        default=0.0,
        description="std of Gaussian noise on the input of later blocks, relative to the activation std; 0: none",
    )
    backbones: BackboneEntries | None = Field(
        default=None,
        description="several backbones in one run, instead of backbone: names joined by commas, or a list of names and "
        "mappings {name, model_args, blocks, alias, settings}",
        examples=["vit_small_patch16_224,swin_tiny_patch4_window7_224"],
        json_schema_extra={"allowed": "timm names joined by commas, or a list of names and mappings"},
    )
    backbone: BackboneSettings = Field(description="timm model to pretrain")
    mask: MaskSettings = Field(default_factory=MaskSettings, description="masking")
    decoder: DecoderSettings = Field(
        default_factory=DecoderSettings,
        description="local decoder of a block; a list has one value per block",
    )
    target: TargetSettings = Field(default_factory=TargetSettings, description="prediction target")
    data: DataSettings = Field(description="data loading")
    schedule: ScheduleSettings = Field(description="training schedule")
    optim: OptimSettings = Field(default_factory=OptimSettings, description="AdamW, one for every block")
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings, description="checkpointing")
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="evaluation of every depth"
    )
    failures: FailureSettings = Field(default_factory=FailureSettings, description="failure handling")
    placement: PlacementSettings = Field(
        default_factory=PlacementSettings,
        description="pipeline stages; a stage holds one or several consecutive blocks",
    )
    search: SearchSettings = Field(
        default_factory=SearchSettings, description="hyperparameter search with Ray Tune before the run"
    )
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description="MLflow")
    estimate: EstimateSettings = Field(default_factory=EstimateSettings, description="estimate of the cost")

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.blocks if isinstance(self.blocks, int) else len(self.blocks)

    def per_block(self, key: str) -> tuple[Any, ...]:
        """The value of `mask.ratio` (see `ratios_by_block`) or of another setting for every block; one holds for all."""
        section, name = key.split(".")
        value = getattr(getattr(self, section), name)
        if key == "mask.ratio":
            return ratios_by_block(value, self.num_blocks)
        return value if isinstance(value, tuple) else (value,) * self.num_blocks

    @model_validator(mode="before")
    @classmethod
    def _first_of_several(cls, values: Any) -> Any:
        """With several backbones no single one has to be named."""
        single = values.get("backbone") or {} if isinstance(values, dict) else None
        if isinstance(single, dict) and values.get("backbones") and "name" not in single:
            entries = parse_backbone_entries(values["backbones"])
            if isinstance(entries, tuple) and entries:
                return values | {"backbone": single | {"name": entries[0].name}}
        return values


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, as `settings.schema.json` beside this file holds it for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}


@cache
def all_settings() -> dict[str, SettingInfo]:
    """Every setting by its dotted key, in the order of `--help-all`."""
    return setting_infos(Settings.model_json_schema())


@cache
def setting_sections() -> dict[str, str]:
    """Group name -> title, in the order of `--help-all`."""
    return section_titles(Settings.model_json_schema())
