"""The depth variants of a run in MLflow: a child run of each from its start, and the results of its evaluation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from bim.models.backbones.backbone import BlockInfo
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.jobs.open_backbone import model_name
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.tracking.descriptions import LEVEL_TAG
from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker

NAMED_BAD_IMAGES = 10
"""Unreadable images that the line about an evaluation names."""

SECTIONS = {"mask_ratio": "mask", "decoder": "decoder"}
"""Parameter of a variant -> section of the settings that a search may change it by; it changes no other parameter."""

log = logging.getLogger(__name__)


def report_bad_images(evaluation: EvaluationResult) -> None:
    """Log how many images the evaluation left out, and which, in one line."""
    bad = evaluation.bad_images
    if bad:
        listed = ", ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:NAMED_BAD_IMAGES])
        more = f" and {len(bad) - NAMED_BAD_IMAGES} more" if len(bad) > NAMED_BAD_IMAGES else ""
        plural = "s" * (len(bad) > 1)
        log.warning("evaluation left out %d unreadable image%s: %s%s", len(bad), plural, listed, more)


def record_variants(
    tracker: Tracker, run: ResolvedRun, evaluation: EvaluationResult, step: int, series: str = ""
) -> None:
    """A child run and a model for every variant. step: updates of their weights; series: name of a baseline's."""
    prefix = f"{series}/" if series else ""
    for report in evaluation.reports:
        block = _block_of(run, report.depth)
        names = ("loss", "loss_always_masked", "loss_newly_masked", "loss_kept", "loss_thrown", "grad_norm")
        curves = {name: tracker.history(f"{prefix}block{block.index}/{name}") for name in names}
        curves["images_per_s"] = tracker.history(f"{prefix}images_per_s")
        record = DepthRecord(
            depth=report.depth,
            folder=Path(evaluation.folders[report.depth]),
            metrics=report.metrics(),
            params=_variant_params(run, report.depth),
            curves={name: curve for name, curve in curves.items() if curve},
            pictures=[Path(evaluation.pictures[report.depth])] if report.depth in evaluation.pictures else [],
            step=step,
            tags=_level_tag(report),
            series=series,
        )
        tracker.log_depth(record, model_name(run))


def _level_tag(report: DepthReport) -> dict[str, str]:
    if report.level_with_best is None:
        return {}
    return {LEVEL_TAG: "yes" if report.level_with_best else "no"}


def begin_variants(
    tracker: Tracker,
    run: ResolvedRun,
    depths: Sequence[int],
    series: str = "",
    undecided: Collection[str] = (),
) -> None:
    """A child run for every variant, before it is trained.

    Args:
        series: of a baseline.
        undecided: settings that a search is still to choose. MLflow never changes a parameter, so those that depend on
            them come with another call.
    """
    tracker.begin_depths({depth: _known_params(run, depth, undecided) for depth in depths}, series)


def _known_params(run: ResolvedRun, depth: int, undecided: Collection[str]) -> dict[str, object]:
    sections = {key.partition(".")[0] for key in undecided}
    return {
        name: value
        for name, value in _variant_params(run, depth).items()
        if SECTIONS.get(name) not in sections
    }


def _variant_params(run: ResolvedRun, depth: int) -> dict[str, object]:
    """The few settings that make a variant."""
    block, settings = _block_of(run, depth), run.settings
    decoder = run.spec.decoders[block.index]
    return {
        "depth": depth,
        "backbone": settings.backbone.name,
        "block": block.index,
        "mask_ratio": run.spec.mask_ratios[block.index],
        "decoder": f"{decoder.depth}x{decoder.dim}",
        "epochs": settings.schedule.epochs,
        "seed": settings.seed,
    }


def _block_of(run: ResolvedRun, depth: int) -> BlockInfo:
    """The block that has the last layer of a variant."""
    return next(block for block in run.backbone.blocks if block.depth >= depth)
