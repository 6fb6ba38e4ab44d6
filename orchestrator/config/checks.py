"""Settings that contradict each other, and settings that have no effect: one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from bim.orchestrator.config.messages import format_value
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.short_forms import start_epoch

PER_BLOCK = (
    "mask.ratio",
    "decoder.name",
    "decoder.depth",
    "decoder.dim",
    "decoder.num_heads",
    "decoder.throw_ratio",
    "target.name",
    "target.cell",
)
"""Settings that take one value for all blocks or a list with one for each (`mask.ratio`: or its two ends)."""


def contradictions(s: Settings) -> list[str]:
    """One sentence for each pair of settings that contradict each other."""
    blocks = s.num_blocks
    problems = [
        f"{key} lists {given} values for {blocks} blocks: give one for each block, or one for all"
        + ", or those of the first and the last block" * (key == "mask.ratio")
        for key in PER_BLOCK
        if (given := len(s.per_block(key))) != blocks
    ]
    ratios = s.per_block("mask.ratio")
    if any(later < earlier for earlier, later in pairwise(ratios)):
        problems.append(
            f"mask.ratio must not decrease from block to block, not {format_value(list(ratios))}: "
            "a later block sees only what the one before it kept"
        )
    if s.data.val_fraction + s.data.test_fraction >= 1:
        problems.append(
            f"data.val_fraction + data.test_fraction must be below 1, not {s.data.val_fraction:g} + "
            f"{s.data.test_fraction:g}: no image would be left to train on"
        )
    low, high = s.data.crop_scale
    if low > high:
        problems.append(f"data.crop_scale must be [smallest, largest], not [{low:g}, {high:g}]")
    if s.schedule.warmup_epochs >= s.schedule.epochs:
        problems.append(
            f"schedule.warmup_epochs must be below schedule.epochs ({s.schedule.epochs}), "
            f"not {s.schedule.warmup_epochs:g}"
        )
    if s.schedule.resolution is not None:
        problems += resolution_problems(s.schedule.resolution, s.schedule.epochs)
    if s.search.resume and s.backbones is not None:
        problems.append("search.resume is for one backbone; with backbones there is no search to continue")
    if s.search.resume and s.out is None:
        problems.append("search.resume needs out: the folder of the run whose search goes on (--out DIR)")
    trial_epochs = s.search.trial_epochs or s.schedule.epochs
    if s.search.trials and s.search.grace_epochs is not None and s.search.grace_epochs > trial_epochs:
        problems.append(
            f"search.grace_epochs must be at most {trial_epochs}, the epochs of a trial, not {s.search.grace_epochs}"
        )
    if s.resume and s.out is None:
        problems.append("resume needs out: the folder of the run to continue (--out DIR --resume)")
    if s.from_scratch and not s.resume:
        problems.append("from_scratch is for a run that is resumed: --resume --from-scratch")
    if s.placement.stages is not None and s.placement.stages > blocks:
        problems.append(
            f"placement.stages must be at most {blocks}, the number of blocks, not {s.placement.stages}"
        )
    return problems


def ineffective_settings(s: Settings) -> list[str]:
    """Settings that differ from their default and change nothing beside the others, one sentence each."""
    return [
        f"{key} has no effect: {reason}" for key, reason in ineffective_keys(s).items() if _changed(s, key)
    ]


def ineffective_keys(s: Settings) -> dict[str, str]:
    """Dotted keys whose value changes nothing beside the other settings, and why."""
    ratios = set(s.per_block("mask.ratio"))
    reasons = (
        (
            set(s.per_block("target.name")) == {"pixels"},
            "no block's target is hog",
            ("target.cell", "target.bins"),
        ),
        (
            not any(s.per_block("decoder.throw_ratio")),
            "decoder.throw_ratio is 0",
            ("decoder.recovery", "decoder.sampler", "decoder.thrown_weight"),
        ),
        (s.decoder.recovery == "none", "thrown tokens are not recovered", ("decoder.thrown_weight",)),
        (len(ratios) == 1, "mask.ratio is the same for all blocks", ("mask.loss_on_newly_masked",)),
        (s.num_blocks == 1, "there is one block", ("boundary_noise",)),
        (
            s.placement.backend == "in_process",
            "placement.backend is in_process",
            ("placement.cpus_per_stage", "placement.wait_s"),
        ),
    )
    reason_of_key: dict[str, str] = {}
    for holds, reason, keys in reasons:
        for key in keys:
            if holds:
                reason_of_key.setdefault(key, reason)
    return reason_of_key


def _changed(s: Settings, key: str) -> bool:
    *group, name = key.split(".")
    holder = getattr(s, group[0]) if group else s
    return bool(getattr(holder, name) != type(holder).model_fields[name].default)


def resolution_problems(phases: Sequence[Sequence[float]], epochs: int) -> list[str]:
    """What is wrong with a resolution schedule of a run of so many epochs, one sentence each."""
    shown = format_value([list(phase) for phase in phases])
    problems = [
        f"schedule.resolution: {name} in {format_value(list(phase))} must be a whole number of at least 1"
        for phase in phases
        for name, value in zip(("pixels", "batch_size", "accumulate"), phase[1:], strict=False)
        if isinstance(value, float) or value < 1
    ]
    if any((isinstance(phase[0], float) and not 0 <= phase[0] < 1) or phase[0] < 0 for phase in phases):
        return [
            *problems,
            f"schedule.resolution must begin each phase with an epoch (0, 40) or a fraction of the run (0.5), not {shown}",
        ]
    starts = [start_epoch(phase[0], epochs) for phase in phases]
    if starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)) or starts[-1] >= epochs:
        problems.append(
            f"schedule.resolution must begin with epoch 0 and go on with later ones, all before {epochs}, not {shown}, "
            f"whose phases begin with epochs {format_value(starts)}"
        )
    return problems
