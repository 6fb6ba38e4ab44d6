"""The lines at the start of a run: model, data, schedule, placement, and notes on settings that may surprise."""

from __future__ import annotations

import math

from bim.models.masks.plan import visible_counts
from bim.orchestrator.config.checks import ineffective_settings
from bim.orchestrator.config.recipes import DEFAULT_RECIPE
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.data.phases import MIN_STEPS, steps_remedy
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.model_cost import block_gflops
from bim.orchestrator.runs.depth_scores import num_scores
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun
from bim.orchestrator.text import short_path, wrapped
from bim.orchestrator.training.lr_schedule import peak_rate

DECODER_COST_WARNING_RATIO = 2.0
"""Ratio of the GFLOPs of all decoders to those of all encoders from which on there is a note."""

MIN_DISTINCT_MASKS = 100
"""Fewer distinct masks than this get a note; 16 units, 4 of them visible, have 1,820."""

DIGITS_PX = 64
"""The largest side, in pixels, up to which the scanned digits of 8 x 8 are enlarged without a note."""


def opening_lines(run: ResolvedRun, prepared: PreparedBackbone, layout: StageLayout) -> list[str]:
    """Model, data, schedule and placement, a line each, then the notes and the output directory."""
    settings, blocks = run.settings, run.backbone.blocks
    layers, splits = "+".join(str(b.layers) for b in blocks), prepared.splits
    notes = [
        *_demo_settings_note(settings, run),
        *ineffective_settings(settings),
        *_patience_note(settings),
        *_few_steps_note(run, len(splits.train)),
        *_padding_note(run),
        *_few_masks_note(run),
        *_expensive_decoder_warning(run),
    ]
    return [
        f"{settings.backbone.name}: {blocks[-1].depth} layers in {len(blocks)} blocks ({layers}), width {blocks[0].width}, "
        f"{_sizes(run)} px, {_targets(run)}",
        f"{settings.data.source}: {len(splits.train)} train / {len(splits.val)} val / {len(splits.test)} test images",
        f"{settings.schedule.epochs} epochs of {_steps(run)} images, "
        f"peak learning rate {_rates(run)}, seed {settings.seed}",
        _placement(settings, layout),
        *(line for note in notes for line in wrapped(f"note: {note}")),
        f"output: {short_path(run.out)}",
    ]


def data_notes(prepared: PreparedBackbone) -> list[str]:
    """What looks like labels or images and is not used, and scores that cannot tell anything; wrapped lines."""
    notes = (*prepared.source.notes, *prepared.splits.notes)
    return [line for note in notes for line in wrapped(f"note: {note}")]


def _placement(settings: Settings, layout: StageLayout) -> str:
    """`blocks 0-1 | 2-3 on 2 Ray actors, 1 GPU each`."""
    stages = layout.stage_blocks
    blocks = " | ".join(f"{stage[0]}-{stage[-1]}" if len(stage) > 1 else f"{stage[0]}" for stage in stages)
    label = f"block{'s' * (sum(map(len, stages)) > 1)} {blocks}"
    device = f"{layout.threads} CPU thread{'s' * (layout.threads > 1)}"
    device = f"{layout.gpus:g} GPU" if layout.gpus else device
    if settings.placement.backend == "ray":
        return f"{label} on {len(stages)} Ray actor{'s' * (len(stages) > 1)}, {device} each"
    return f"{label} in this process, {device}"


def _demo_settings_note(settings: Settings, run: ResolvedRun) -> list[str]:
    """For the demo's settings, the default recipe, with other images or sizes."""
    is_one_of_several = settings.name.startswith(f"{DEFAULT_RECIPE}-")
    if settings.name != DEFAULT_RECIPE and not is_one_of_several:
        return []
    if settings.data.source == "digits":
        width = max(run.backbone.image_size)
        return [
            f"the images are the demo's digits, scans of 8 x 8 pixels, enlarged to {width} px; --data.source gives others"
        ] * (width > DIGITS_PX)
    return [
        f"learning rate, crops, epochs and search are those of the recipe {DEFAULT_RECIPE}, which is meant for scans of "
        "32 px; --recipe vit_base_imagenet or sign_digits is nearer to photographs"
    ]


def _patience_note(settings: Settings) -> list[str]:
    """For a patience that cannot end the training: that takes a first score, and then so many in a row."""
    patience, scores = settings.evaluation.patience, num_scores(settings)
    if patience is None or patience < scores:
        return []
    reason = "evaluation.every_epochs is 0"
    if settings.evaluation.every_epochs != 0:
        epochs = settings.schedule.epochs
        in_all = f"{epochs} epoch{'s' * (epochs > 1)}"
        reason = f"it needs {patience + 1} scores, and there are {scores} in {in_all}"
    return [f"evaluation.patience has no effect: {reason}"]


def _few_steps_note(run: ResolvedRun, images: int) -> list[str]:
    """For epochs of fewer than `MIN_STEPS` steps, where smaller batches have more.

    Not for the scanned digits: their recipes set the batch for them, and have 19 steps.
    """
    phase = min(run.phases, key=lambda phase: phase.steps_per_epoch)
    steps = phase.steps_per_epoch
    if steps >= min(MIN_STEPS, images) or run.settings.data.source == "digits":
        return []
    return [
        f"an epoch has {steps} step{'s' * (steps > 1)} of {phase.images_per_step} images, and should have {MIN_STEPS} or "
        f"more; {steps_remedy(images, phase)}"
    ]


def _padding_note(run: ResolvedRun) -> list[str]:
    """For variants that pad windows, which the trained blocks do not."""
    size = run.backbone.image_size
    padded = ", ".join(str(level + 1) for level in run.backbone.padded_levels(size))
    if not padded:
        return []
    return [
        f"at {size[0]} x {size[1]} px the windows of level {padded} do not divide the grid; timm pads them with tokens that "
        "training never sees (docs/backbones.md)"
    ]


def _few_masks_note(run: ResolvedRun) -> list[str]:
    """For grids with fewer than `MIN_DISTINCT_MASKS` masks."""
    rows, columns = run.backbone.grid
    visible = visible_counts(rows * columns, run.spec.mask_ratios)[-1]
    num_masks = math.comb(rows * columns, visible)
    if num_masks >= MIN_DISTINCT_MASKS:
        return []
    size = run.backbone.image_size
    return [
        f"at {size[0]} x {size[1]} px there are {rows * columns} mask units, of which {visible} stay visible: {num_masks} "
        "different masks in all; larger images have more"
    ]


def _expensive_decoder_warning(run: ResolvedRun) -> list[str]:
    """For decoders of fine grids that cost more than encoding visible tokens alone saves."""
    blocks = run.backbone.blocks
    if len({block.stride for block in blocks}) == 1:
        return []
    size = run.backbone.image_size
    costs = block_gflops(run.spec, run.backbone, size)
    encoders, decoders = (sum(parts) for parts in zip(*costs, strict=True))
    if decoders < DECODER_COST_WARNING_RATIO * encoders:
        return []
    k = max(range(len(costs)), key=lambda k: costs[k][1])
    rows, columns = (side // blocks[k].stride for side in size)
    advice = "lower decoder.dim or raise decoder.throw_ratio there (docs/backbones.md)"
    if run.backbone.encode == "all":  # its decoders add no mask tokens, so none can be thrown
        advice = "lower decoder.dim there, or take fewer blocks (docs/backbones.md)"
    return [
        f"the decoders cost {decoders / encoders:.1f} times the encoders, most of it in block {k}, on {rows} x {columns} "
        f"tokens; {advice}"
    ]


def _sizes(run: ResolvedRun) -> str:
    """The training sizes in their order: `128 x 128 -> 160 x 160`."""
    return " -> ".join(f"{phase.size[0]} x {phase.size[1]}" for phase in run.phases)


def _steps(run: ResolvedRun) -> str:
    """Steps of an epoch and images of a step, phase by phase: `19 steps of 64`."""
    return ", then ".join(
        dict.fromkeys(
            f"{p.steps_per_epoch} step{'s' * (p.steps_per_epoch > 1)} of {p.images_per_step}"
            for p in run.phases
        )
    )


def _rates(run: ResolvedRun) -> str:
    """Peak learning rates, phase by phase, scaled with the images of a step: `0.004, then 0.002`."""
    blr = run.settings.optim.blr
    return ", then ".join(dict.fromkeys(f"{peak_rate(blr, phase):.3g}" for phase in run.phases))


def _targets(run: ResolvedRun) -> str:
    """`pixels`, or the ladder of targets: `hog of 8 px, hog of 16 px`."""
    names = [t.name + (f" of {t.args['cell']} px" if "cell" in t.args else "") for t in run.spec.targets]
    return ", ".join(names if len(set(names)) > 1 else names[:1])
