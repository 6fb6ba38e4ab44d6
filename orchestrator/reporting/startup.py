"""What a finished run tells: opening lines, the depth variants and the summary in MLflow and in the output directory.

Turns records of the other parts into text and into calls of the tracker; measures nothing.
"""

from __future__ import annotations

import math

from bim.models.masks.plan import visible_counts
from bim.orchestrator.config.checks import without_effect
from bim.orchestrator.config.recipes import DEFAULT_RECIPE
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.distributed.placement import Layout
from bim.orchestrator.evaluation.model_cost import block_gflops
from bim.orchestrator.runs.prepare import Family, Prepared
from bim.orchestrator.text import short_path, wrapped
from bim.orchestrator.training.lr_schedule import peak_rate

DEAR = 2.0
"""Cost of all decoders over that of all encoders from which on it is told."""

FEW_MASKS = 100
"""Fewer different masks than these are told at the start; 16 units, 4 of them visible, have 1,820."""

DIGITS_PX = 64
"""The largest image, in pixels, to which the scanned digits are worth enlarging; they have 8 x 8."""


def opening_lines(family: Family, prepared: Prepared, layout: Layout) -> list[str]:
    """What is about to happen, for the person who started it."""
    settings, blocks = family.settings, family.backbone.blocks
    layers = "+".join(str(b.layers) for b in blocks)
    stages = len(layout.places)
    where = " | ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in layout.places)
    on = f"{layout.gpus:g} GPU" if layout.gpus else f"{layout.threads} CPU thread{'s' * (layout.threads > 1)}"
    place = f"in this process, {on}"
    if settings.placement.backend == "ray":
        place = f"on {stages} Ray actor{'s' * (stages > 1)}, {on} each"
    splits = prepared.splits
    return [
        f"{settings.backbone.name}: {blocks[-1].depth} layers in {len(blocks)} blocks ({layers}), width {blocks[0].width}, "
        f"{_sizes(family)} px, {_targets(family)}",
        f"{settings.data.source}: {len(splits.train)} images to train on, {len(splits.val)} for validation, "
        f"{len(splits.test)} for the final scores",
        f"{settings.schedule.epochs} epochs of {_steps(family)} images, "
        f"peak learning rate {_rates(family)}, seed {settings.seed}",
        f"block{'s' * (len(blocks) > 1)} {where} {place}",
        *(
            line
            for said in [
                *_meant_for_digits(settings, family),
                *without_effect(settings),
                *_padding(family),
                *_few_masks(family),
                *_dear_decoders(family),
            ]
            for line in wrapped(f"note: {said}")
        ),
        f"output: {short_path(family.out)}",
    ]


def _meant_for_digits(settings: Settings, family: Family) -> list[str]:
    """That the demo's settings are used for other images or sizes, where they are: whoever names no recipe has them."""
    is_one_of_several = settings.name.startswith(f"{DEFAULT_RECIPE}-")
    if settings.name != DEFAULT_RECIPE and not is_one_of_several:
        return []
    if settings.data.source == "digits":
        width = max(family.backbone.image_size)
        return [
            f"the images are the demo's digits, scans of 8 x 8 pixels, enlarged to {width} px; --data.source gives others"
        ] * (width > DIGITS_PX)
    return [
        f"learning rate, crops, epochs and search are those of the recipe {DEFAULT_RECIPE}, which is meant for scans of "
        "32 px; --recipe vit_base_imagenet or sign_digits is nearer to photographs"
    ]


def _padding(family: Family) -> list[str]:
    """What a variant computes otherwise than the blocks that were trained, if it does."""
    size = family.backbone.image_size
    padded = ", ".join(str(level + 1) for level in family.backbone.padded_levels(size))
    if not padded:
        return []
    return [
        f"at {size[0]} x {size[1]} px the windows of level {padded} do not divide the grid; timm pads them with tokens that "
        "training never sees (docs/backbones.md)"
    ]


def _few_masks(family: Family) -> list[str]:
    """That there are hardly any masks to draw, where that is so."""
    rows, columns = family.backbone.grid
    visible = visible_counts(rows * columns, family.spec.mask_ratios)[-1]
    different = math.comb(rows * columns, visible)
    if different >= FEW_MASKS:
        return []
    size = family.backbone.image_size
    return [
        f"at {size[0]} x {size[1]} px there are {rows * columns} mask units, of which {visible} stay visible: {different} "
        "different masks in all; larger images have more"
    ]


def _dear_decoders(family: Family) -> list[str]:
    """That most of the work is in the decoders of fine grids, where it is: what visible tokens save would be lost there."""
    blocks = family.backbone.blocks
    if len({block.stride for block in blocks}) == 1:
        return []
    size = family.backbone.image_size
    costs = block_gflops(family.spec, family.backbone, size)
    encoders, decoders = (sum(parts) for parts in zip(*costs, strict=True))
    if decoders < DEAR * encoders:
        return []
    k = max(range(len(costs)), key=lambda k: costs[k][1])
    rows, columns = (side // blocks[k].stride for side in size)
    advice = "lower decoder.dim or raise decoder.throw_ratio there (docs/backbones.md)"
    if family.backbone.encode == "all":  # its decoders add no mask tokens that they could throw
        advice = "lower decoder.dim there, or take fewer blocks (docs/backbones.md)"
    return [
        f"the decoders cost {decoders / encoders:.1f} times the encoders, most of it in block {k}, on {rows} x {columns} "
        f"tokens; {advice}"
    ]


def _sizes(family: Family) -> str:
    """The training sizes in their order: `128 x 128 -> 160 x 160`."""
    return " -> ".join(f"{phase.size[0]} x {phase.size[1]}" for phase in family.phases)


def _steps(family: Family) -> str:
    """Steps of an epoch and images of a step, phase by phase: `19 steps of 64`."""
    counted = dict.fromkeys(f"{p.steps_per_epoch} steps of {p.images_per_step}" for p in family.phases)
    return ", then ".join(counted)


def _rates(family: Family) -> str:
    """Peak learning rates, phase by phase, as they follow the images of a step: `0.004, then 0.002`."""
    found = dict.fromkeys(f"{peak_rate(family.settings.optim.blr, p):.3g}" for p in family.phases)
    return ", then ".join(found)


def _targets(family: Family) -> str:
    """`pixels`, or the ladder of targets: `hog of 8 px, hog of 16 px`."""
    named = [t.name + (f" of {t.args['cell']} px" if "cell" in t.args else "") for t in family.spec.targets]
    return ", ".join(named if len(set(named)) > 1 else named[:1])
