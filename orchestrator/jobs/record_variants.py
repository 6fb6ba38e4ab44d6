"""The depth variants of a run in MLflow: a child run of each from its start, and the results of its evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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


def begin_variants(tracker: Tracker, run: ResolvedRun, depths: Sequence[int], series: str = "") -> None:
    """A child run for every variant, before it is trained; `series` names a baseline's."""
    tracker.begin_depths({depth: _variant_params(run, depth) for depth in depths}, series)


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
