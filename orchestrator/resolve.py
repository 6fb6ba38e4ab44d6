"""From settings to what actors are built from: opens the backbone, gives every block its own values, names the data.

Makes the checks that need the backbone, so that they fail before anything starts. Serves the pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from models.backbones import open_backbone
from models.backbones.backbone import Backbone
from models.decoders import decoder_heads
from models.masking import visible_counts
from orchestrator.block_trainer import OptimSpec, Precision
from orchestrator.config import Settings, SettingsError
from orchestrator.data.spec import DataSpec
from orchestrator.stages import DecoderSpec, FamilySpec


def resolve(settings: Settings, auto_precision: Precision = "fp32") -> tuple[FamilySpec, Backbone]:
    """The family that the settings describe, one value per block, and its backbone.

    Args:
        auto_precision: what `optim.precision: auto` means on the device of the stages.

    Raises:
        SettingsError: the backbone cannot be opened or cut as asked; or, one a line, a mask ratio leaves nothing to
            see or to predict, a decoder has no such size, `init_from` cannot be read or does not fit.
    """
    try:
        backbone = open_backbone(settings.backbone.name, settings.blocks, settings.backbone.model_args)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    ratios = settings.per_block("mask.ratio")
    sizes = zip(
        *(settings.per_block(f"decoder.{name}") for name in ("depth", "dim", "num_heads")), strict=True
    )
    decoders = tuple(DecoderSpec(depth, dim, heads) for depth, dim, heads in sizes)
    problems: dict[str, None] = {}  # in order, each once
    checks: list[Callable[[], object]] = [lambda: visible_counts(backbone.grid[0] * backbone.grid[1], ratios)]
    checks += [partial(decoder_heads, d.dim, d.depth, d.num_heads) for d in decoders]
    if settings.init_from is not None:
        checks.append(partial(backbone.check_init_from, settings.init_from))
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems[str(error)] = None
    if problems:
        raise SettingsError("\n".join(problems))
    optim = settings.optim
    spec = FamilySpec(
        backbone=backbone.name,
        model_args=dict(backbone.model_args),
        blocks=tuple(block.layers for block in backbone.blocks),
        mask_ratios=ratios,
        decoders=decoders,
        target=settings.target.name,
        target_args={"normalize": settings.target.normalize},
        score_newly_dropped=settings.mask.score_newly_dropped,
        seed=settings.seed,
        init_from=settings.init_from,
        mean=backbone.mean,
        std=backbone.std,
        optim=OptimSpec(
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            clip_grad=optim.clip_grad,
            precision=auto_precision if optim.precision == "auto" else optim.precision,
        ),
    )
    return spec, backbone


def data_spec(settings: Settings, size: tuple[int, int]) -> DataSpec:
    """The data that the settings name, for crops of `size` (height, width) in pixels; not opened yet."""
    data = settings.data
    return DataSpec(
        source=data.source,
        batch_size=data.batch_size,
        size=size,
        accumulate=data.accumulate,
        image_column=data.image_column,
        label_column=data.label_column,
        workers=data.workers,
        crop_scale=data.crop_scale,
        flip=data.flip,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        seed=settings.seed,
    )
