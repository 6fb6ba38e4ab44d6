"""The comparison of several backbones: the MLflow run above theirs, their common table and picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.distributed.cluster import run_on_worker
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout
from bim.orchestrator.evaluation.evaluate import RANKME_IMAGES
from bim.orchestrator.evaluation.features import MAX_IMAGES
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.files import atomic_write
from bim.orchestrator.jobs.backbone_run import BackboneRun, format_error
from bim.orchestrator.jobs.evaluate_checkpoint import add_latency, rewrite_cards
from bim.orchestrator.jobs.evaluation_task import EvaluationTask
from bim.orchestrator.jobs.open_backbone import EVENTS, cluster_text, data_record
from bim.orchestrator.jobs.prepare import PreparedJob
from bim.orchestrator.jobs.records import record_progress
from bim.orchestrator.reporting.comparison import (
    ALL_COLUMNS,
    MemberResult,
    comparison_rows,
    comparison_table,
    quality_key,
    read_rows,
)
from bim.orchestrator.reporting.figures.backbones import comparison_figure
from bim.orchestrator.reporting.figures.style import add_title, picture_title
from bim.orchestrator.reporting.log import log_to_file
from bim.orchestrator.reporting.summary import write_summary
from bim.orchestrator.runs.output_dir import Claim
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.runs.signals import at_forced_exit
from bim.orchestrator.text import redact
from bim.orchestrator.tracking.descriptions import fenced, run_address
from bim.orchestrator.tracking.store import TrackingError
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.storage import is_url

log = logging.getLogger(__name__)


def open_comparison(job: PreparedJob, cluster: ClusterResources, claim: Claim, stack: ExitStack) -> Tracker:
    """The MLflow run above those of all backbones, with what they have in common.

    Args:
        claim: of the output directory.
        stack: closes what is opened here.

    Raises:
        TrackingError, StorageError: the run has not begun.
    """
    settings, tracking = job.settings, job.settings.tracking
    resumed = Tracker.recorded_run(job.out) if settings.resume else None
    text = settings_to_yaml(with_changes(settings, {"resume": False, "from_scratch": False}))
    with claim.begin():
        atomic_write(job.out / SAVED_SETTINGS, text)
        tracker = stack.enter_context(
            Tracker.open(
                tracking.uri, tracking.experiment, job.out.name, job.out, resumed, tracking.model_name
            )
        )
    stack.enter_context(at_forced_exit(tracker.end_at_once))
    stack.enter_context(log_to_file(job.out / EVENTS))
    params = {
        "backbones": ", ".join(backbone.name for backbone in job.backbones),
        "data.source": redact(settings.data.source),
        "schedule.epochs": settings.schedule.epochs,
        "seed": settings.seed,
    }
    tracker.log_settings(params, text)
    facts = {"cluster": cluster_text(cluster)}
    tracker.log_provenance(collect(data_record(job.backbones[0]), facts))
    return tracker


def measure_pending_latencies(backbones: Sequence[BackboneRun]) -> None:
    """Measure the latencies that waited until nothing else runs; what cannot be measured is left out."""
    pending = [backbone for backbone in backbones if backbone.latency_pending and backbone.failed is None]
    if pending:
        log.info("measuring latency")
    for backbone in pending:
        with backbone.lines():
            _measure_latency(backbone)
        record_progress(backbone)


def _measure_latency(backbone: BackboneRun) -> None:
    backbone.latency_pending = False
    for number, (run, layout) in enumerate(backbone.placements):
        task, result = backbone.tasks[number], backbone.evaluations[number]
        try:
            backbone.evaluations[number] = _with_latency(run, layout, task, result)
        except Exception as error:  # a measurement must not cost what was trained
            log.info("no latencies%s: %s", " of the baseline" if number else "", format_error(error))


def _with_latency(
    run: ResolvedRun, layout: StageLayout, task: EvaluationTask, result: EvaluationResult
) -> EvaluationResult:
    if run.settings.placement.backend != "ray":
        return add_latency(task, result)
    if not is_url(task.checkpoint):
        return run_on_worker(add_latency, layout, task, result)
    # The worker does not see the output directory with the model cards.
    timed = run_on_worker(add_latency, layout, task, replace(result, folders={}))
    timed = replace(timed, folders=result.folders)
    rewrite_cards(task, timed)
    return timed


def record_comparison(
    job: PreparedJob, backbones: Sequence[BackboneRun], tracker: Tracker
) -> tuple[str, list[MemberResult]]:
    """The table and the picture of all backbones, in the output directory and on their common MLflow page.

    Args:
        backbones: those that ran now.

    Returns the table, and how every backbone ended.
    """
    failures = {backbone.name: backbone.failed for backbone in backbones}
    results = [_result(prepared, failures.get(prepared.name)) for prepared in job.backbones]
    reports = [report for run in backbones for part in run.evaluations for report in part.reports]
    # An earlier process may have counted the accuracies.
    num_test = max((report.n_test for report in reports), default=0)
    num_test = num_test or min(len(job.backbones[0].splits.test), MAX_IMAGES)
    device = next((report.device for report in reports if report.device), "")
    table = comparison_table(results, num_test, device)
    atomic_write(job.out / "summary.txt", table + "\n")
    for path in write_summary(comparison_rows(results), job.out, ALL_COLUMNS):
        tracker.log_file(path)
    figure = comparison_figure(results, device)
    if figure is not None:
        counted = _counted_images(job, results, reports, num_test)
        add_title(figure, picture_title(job.settings.name, job.settings.data.source, counted))
        tracker.log_picture(figure, "backbones")
    tracker.set_tags({f"backbone.{r.name}": "failed" if r.failed else "finished" for r in results})
    describe_comparison(job, tracker, table, [] if figure is None else ["backbones"])
    return table, results


def _counted_images(
    job: PreparedJob, results: Sequence[MemberResult], reports: Sequence[DepthReport], num_test: int
) -> str:
    """`359 test images`, or the training images of RankMe."""
    if quality_key(results) == "knn_top1":
        return f"{num_test} test images"
    num_ranked = max(
        (report.n_ranked for report in reports), default=0
    )  # an earlier process may have counted
    return f"{num_ranked or min(len(job.backbones[0].splits.train), RANKME_IMAGES)} training images"


def describe_comparison(
    job: PreparedJob, tracker: Tracker, table: str = "", pictures: Sequence[str] = ()
) -> None:
    """The description of the run above those of all backbones, with links to them, from its first minute.

    table: of the results, once they are there.
    """
    run_ids = {prepared.name: _recorded_run(job.out / prepared.name) for prepared in job.backbones}
    links = ", ".join(
        f"[{name}]({run_address(tracker.experiment_id, run_id)})"
        for name, run_id in run_ids.items()
        if run_id is not None
    )
    source, images = redact(job.settings.data.source), len(job.backbones[0].splits.train)
    text = (
        f"{len(run_ids)} backbone{'s' * (len(run_ids) > 1)} side by side, "
        f"{_epochs(job)} epochs of {images:,} images of {source}: {links}. "
        "The page of each has its estimate, its depths and its losses."
    )
    tracker.describe("\n\n".join([text, *([fenced(table)] if table else [])]), pictures)


def _epochs(job: PreparedJob) -> str:
    """`100`, or `50 to 100` where backbones differ."""
    epochs = [prepared.run.settings.schedule.epochs for prepared in job.backbones]
    low, high = min(epochs), max(epochs)
    return f"{low}" if low == high else f"{low} to {high}"


def _recorded_run(out: Path) -> str | None:
    try:
        return Tracker.recorded_run(out)
    except TrackingError:  # of a backbone that an earlier process finished; it has no link
        return None


def _result(prepared: PreparedBackbone, failed: str | None) -> MemberResult:
    """How a backbone ended: with the rows in its folder, or with a failure."""
    run = prepared.run
    rows = read_rows(run.out) if failed is None else ()
    return MemberResult(prepared.name, run.settings.backbone.name, run.backbone.image_size, rows, failed)
