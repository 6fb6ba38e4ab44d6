"""From settings to the specs that actors are built from: the backbone opened, every block with its own values.

Makes the checks that need the backbone, so that they fail before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain

from bim.models.backbones import open_backbone
from bim.models.backbones.backbone import Backbone
from bim.models.decoders import BUILT_IN_DECODERS
from bim.models.decoders.decoder import decoder_heads
from bim.models.masks.plan import visible_counts
from bim.models.masks.sampling import kept_count, max_throw_ratio
from bim.models.targets import BUILT_IN_TARGETS, TARGETS
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.short_forms import start_epoch
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.data.source import given_source
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.plugins import PluginError, import_plugins
from bim.orchestrator.runs.registered import (
    Check,
    encoding_check,
    name_problems,
    registered_checks,
    target_args,
)
from bim.orchestrator.training.spec import DecoderSpec, OptimSpec, Precision, PretrainSpec, TargetSpec

MAX_BATCH_BYTES = 2**37
MAX_TOKENS = 2**17
MAX_PARAMS = 2 * 10**11
"""Bounds that no machine reaches: bytes of the images of a micro-batch, tokens of an image, parameters of a run."""

SCORES_PER_RUN = 10
"""Scores while a run trains, before its end, at most, where the settings leave it open."""


def resolve(
    settings: Settings, auto_precision: Precision = "fp32", reads_init_from: bool = True
) -> tuple[PretrainSpec, Backbone]:
    """The spec that the settings describe, one value per block, and its backbone.

    Args:
        auto_precision: what `optim.precision: auto` means on the device of the stages.
        reads_init_from: whether the run begins with the weights that `init_from` names; from a checkpoint it does not.

    The modules of `plugins` are imported first.

    Raises:
        SettingsError: a plugin cannot be imported; the backbone cannot be opened or cut as asked; or, one a line, what of
            masks, decoders, targets, resolutions or `init_from` does not fit it.
    """
    load_plugins(settings)
    name_errors = name_problems(settings)
    try:
        backbone = open_backbone(
            settings.backbone.name, settings.blocks, settings.backbone.model_args, settings.mask.encode
        )
    except ValueError as error:
        raise SettingsError("\n".join([str(error), *name_errors])) from error
    if name_errors:
        raise SettingsError("\n".join(name_errors))
    decoders, targets = _decoders(settings), _targets(settings)
    checks = _checks(settings, backbone, decoders, targets)
    if settings.init_from is not None and reads_init_from:
        checks = chain(checks, [partial(backbone.check_init_from, settings.init_from)])
    _raise_all(checks)
    optim = settings.optim
    spec = PretrainSpec(
        backbone=backbone.name,
        model_args=dict(backbone.model_args),
        blocks=tuple(block.layers for block in backbone.blocks),
        mask_ratios=_mask_ratios(settings, backbone),
        decoders=decoders,
        targets=targets,
        encode=backbone.encode,
        mask_per_batch=settings.mask.per_batch,
        sweep_groups=settings.mask.sweep_groups,
        boundary_noise=settings.boundary_noise,
        loss_on_newly_masked=settings.mask.loss_on_newly_masked,
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
        plugins=settings.plugins,
    )
    _raise_all(registered_checks(spec, backbone))
    return spec, backbone


def load_plugins(settings: Settings) -> None:
    """Import the modules that the settings name, for what they register. Raises SettingsError."""
    try:
        import_plugins(settings.plugins)
    except PluginError as error:
        raise SettingsError(str(error)) from error


def _raise_all(checks: Iterable[Check]) -> None:
    """Raise SettingsError with the message of every check that raises a ValueError, each once, in their order."""
    problems: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems[str(error)] = None
    if problems:
        raise SettingsError("\n".join(problems))


def _mask_ratios(settings: Settings, backbone: Backbone) -> tuple[float, ...]:
    """The mask ratio of every block. Where all tokens are encoded, block 0 masks for all: the end of a range holds."""
    ratios, given = settings.per_block("mask.ratio"), settings.mask.ratio
    is_range = isinstance(given, tuple) and len(given) == 2
    return ratios[-1:] * len(ratios) if is_range and backbone.encode == "all" else ratios


def _decoders(settings: Settings) -> tuple[DecoderSpec, ...]:
    names = ("depth", "dim", "num_heads", "throw_ratio", "name")
    per_block = zip(*(settings.per_block(f"decoder.{name}") for name in names), strict=True)
    shared = settings.decoder
    return tuple(
        DecoderSpec(
            depth, dim, heads, throw_ratio, shared.recovery, shared.sampler, shared.thrown_weight, name
        )
        for depth, dim, heads, throw_ratio, name in per_block
    )


def _targets(settings: Settings) -> tuple[TargetSpec, ...]:
    """Every block's target, with the keywords that it declares."""
    shared = {"normalize": settings.target.normalize, "bins": settings.target.bins}
    return tuple(
        TargetSpec(name, target_args(name, shared | {"cell": cell}))
        for name, cell in zip(
            settings.per_block("target.name"), settings.per_block("target.cell"), strict=True
        )
    )


def _checks(
    settings: Settings,
    backbone: Backbone,
    decoders: tuple[DecoderSpec, ...],
    targets: tuple[TargetSpec, ...],
) -> Iterator[Check]:
    """What must not raise a ValueError, the cause before its consequences."""
    ratios = _mask_ratios(settings, backbone)
    sizes = dict.fromkeys(
        [backbone.image_size, *(phase.size for phase in resolution_phases(settings, backbone))]
    )
    for size in sizes:
        yield partial(backbone.check_size, size)
        if any(side % backbone.mask_unit_px for side in size):
            continue
        rows, columns = backbone.grid_at(size)
        yield partial(visible_counts, rows * columns, ratios)
        yield partial(_check_thrown, backbone, decoders, rows * columns, ratios)
        yield partial(_check_cells, targets, size)
    yield partial(_check_memory, settings, backbone, decoders)
    for decoder in decoders:
        yield partial(encoding_check, decoder.name, backbone)
        if decoder.name in BUILT_IN_DECODERS:
            yield partial(decoder_heads, decoder.dim, decoder.depth, decoder.num_heads)
    for info, target in zip(backbone.blocks, targets, strict=True):
        if target.name in BUILT_IN_TARGETS:
            yield partial(TARGETS[target.name], info.stride, **target.args)
    if backbone.encode == "all":
        yield partial(_check_all_encoded, decoders, ratios)


def _check_memory(settings: Settings, backbone: Backbone, decoders: tuple[DecoderSpec, ...]) -> None:
    """Raises ValueError for sizes that exceed the memory of any machine."""
    for phase in resolution_phases(settings, backbone):
        images = phase.batch_size * 3 * phase.size[0] * phase.size[1]
        if images > MAX_BATCH_BYTES:
            raise ValueError(
                f"a batch of {phase.batch_size} images of {phase.size[0]} x {phase.size[1]} pixels has "
                f"{images / 2**30:.0f} GiB; lower data.batch_size and raise data.accumulate, or lower the image size"
            )
        for info in backbone.blocks:
            tokens = (phase.size[0] // info.stride) * (phase.size[1] // info.stride)
            if tokens > MAX_TOKENS:
                raise ValueError(
                    f"images of {phase.size[0]} x {phase.size[1]} pixels are {tokens} tokens in block {info.index}; "
                    f"at most {MAX_TOKENS} are possible: lower backbone.model_args.img_size or schedule.resolution"
                )
    widths = [(info.layers, info.width) for info in backbone.blocks] + [(d.depth, d.dim) for d in decoders]
    # A transformer layer, attention and MLP, has about 12 width^2 parameters.
    params = sum(12 * layers * width * width for layers, width in widths)
    if params > MAX_PARAMS:
        raise ValueError(
            f"blocks and decoders would have about {params / 1e9:.0f} thousand million parameters; "
            "lower backbone.model_args or decoder.dim"
        )


def _check_thrown(
    backbone: Backbone, decoders: tuple[DecoderSpec, ...], units: int, ratios: tuple[float, ...]
) -> None:
    """Raises the ValueError of the block with the lowest limit, where `throw_ratio` is above that of several."""
    refused: list[tuple[float, int, str]] = []
    for info, decoder, visible in zip(backbone.blocks, decoders, visible_counts(units, ratios), strict=True):
        per_unit = (backbone.mask_unit_px // info.stride) ** 2
        try:
            kept_count(units * per_unit, visible * per_unit, decoder.throw_ratio)
        except ValueError as error:
            refused.append((max_throw_ratio(units * per_unit, visible * per_unit), info.index, str(error)))
    if refused:
        _, index, problem = min(refused)
        all_alike = len(refused) == len(decoders) and len({limit for limit, _, _ in refused}) == 1
        raise ValueError(problem if all_alike else f"block {index}: {problem}")


def _check_cells(targets: tuple[TargetSpec, ...], size: tuple[int, int]) -> None:
    for target in targets:
        cell = target.args.get("cell", 1)
        if any(side % cell for side in size):
            raise ValueError(
                f"target.cell {cell} does not divide images of {size[0]} x {size[1]} pixels; give another cell or size"
            )


def _check_all_encoded(decoders: tuple[DecoderSpec, ...], ratios: tuple[float, ...]) -> None:
    if any(decoder.throw_ratio for decoder in decoders):
        raise ValueError(
            "decoder.throw_ratio must be 0 where all tokens are encoded (mask.encode all): the decoder adds no mask tokens "
            "that it could throw"
        )
    if len(set(ratios)) > 1:
        raise ValueError(
            f"mask.ratio must be the same in every block where all tokens are encoded (mask.encode all), not "
            f"{list(ratios)}: block 0 fills the masked units for all of them"
        )


def resolution_phases(settings: Settings, backbone: Backbone) -> tuple[PhaseSpec, ...]:
    """The phases of the run: those of `schedule.resolution`, or one at the backbone's own size."""
    data, epochs = settings.data, settings.schedule.epochs
    if settings.schedule.resolution is None:
        return (PhaseSpec(0, backbone.image_size, data.batch_size, data.accumulate),)
    phases = []
    for start, pixels, *rest in settings.schedule.resolution:
        batch = rest[0] if rest else data.batch_size
        grad_accum_steps = rest[1] if len(rest) > 1 else data.accumulate
        size = (int(pixels), int(pixels))
        phases.append(PhaseSpec(start_epoch(start, epochs), size, int(batch), int(grad_accum_steps)))
    return tuple(phases)


def data_spec(settings: Settings, backbone: Backbone) -> DataSpec:
    """The data that the settings name, as crops of the sizes of the run; not opened yet."""
    data = settings.data
    return DataSpec(
        source=data.source,
        phases=resolution_phases(settings, backbone),
        image_column=data.image_column,
        label_column=data.label_column,
        workers=data.workers,
        crop_scale=data.crop_scale,
        flip=data.flip,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        seed=settings.seed,
        plugins=settings.plugins,
        given=given_source(data.source),
    )


def spread_scores(epochs: int, most: int) -> int:
    """Epochs between two scores, so that a run of `epochs` has `most` before its end, or fewer; one if there is an epoch."""
    return max(1, math.ceil((epochs - 1) / most))


def epochs_between_scores(settings: Settings) -> int | None:
    """Epochs between two scores of the depths while they train; None: they are scored at the end alone."""
    every = settings.evaluation.every_epochs
    if every is None:
        every = spread_scores(settings.schedule.epochs, SCORES_PER_RUN)
    return every or None


def eval_config(settings: Settings) -> EvalConfig:
    """How the depth variants of these settings are measured; samples are drawn from the seed of the splits."""
    return EvalConfig(
        **settings.evaluation.model_dump(exclude={"every_epochs", "patience"}),
        seed=settings.data.split_seed,
        max_bad_fraction=settings.data.max_bad_fraction,
    )
