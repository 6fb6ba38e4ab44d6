"""The main job: settings in, trained, evaluated, exported and recorded backbones out; a single one, or several compared.

Composes the parts and holds no arithmetic. What can be wrong with the input is found in `prepare` or before the first
actor starts; those errors are `BAD_INPUT`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.distributed.cluster import ClusterError, ray_cluster
from bim.orchestrator.distributed.placement import ClusterResources, PlacementError
from bim.orchestrator.files import is_of_folder, os_error_text, remove_temporary_files
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.jobs.comparison import (
    describe_comparison,
    measure_pending_latencies,
    open_comparison,
    record_comparison,
)
from bim.orchestrator.jobs.cost import cpus_of_each, log_estimate
from bim.orchestrator.jobs.layouts import shared_layouts, single_layouts
from bim.orchestrator.jobs.open_backbone import (
    describe_beginning,
    log_settings,
    open_backbone_run,
    undecided_settings,
    write_settings,
)
from bim.orchestrator.jobs.prepare import PreparedJob
from bim.orchestrator.jobs.record_variants import begin_variants
from bim.orchestrator.jobs.records import record_progress, record_search
from bim.orchestrator.jobs.search_job import run_search, search_due
from bim.orchestrator.jobs.train_backbones import train_backbones
from bim.orchestrator.reporting.closing import closing_lines, following_lines, several_closing_lines
from bim.orchestrator.reporting.startup import data_notes, opening_lines
from bim.orchestrator.runs.output_dir import Claim, OutputError, claim, remove_unfinished_files
from bim.orchestrator.runs.run_store import storage_failure
from bim.orchestrator.runs.signals import at_forced_exit, interrupted_by_signals
from bim.orchestrator.runs.train import check_precision, resolve_precision
from bim.orchestrator.search.record import finished_search
from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.store import TrackingError
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.restart_policy import is_disk_error

BAD_INPUT = (SettingsError, DataError, OutputError, PlacementError, TrackingError, ClusterError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Args:
        stopped: the signal that ended it early.
        table: the results as text.
        closing: lines that tell where everything is.
        failed: one sentence for each of several backbones that did not come to its end.
    """

    out: Path
    stopped: str | None
    table: str = ""
    closing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def run_job(job: PreparedJob, stop: StopRequest | None = None) -> JobResult:
    """Train, evaluate, export and record the backbones of a job, and compare them if there are several.

    Args:
        stop: of the command that runs the job; its signals came since the command began.

    Raises:
        OutputError, PlacementError, TrackingError, ClusterError: before the first actor starts.
        TrainingError: a single backbone cannot be trained further, or the file system of the output directory refuses; the
            last checkpoint stays.
    """
    stop = stop or StopRequest()
    try:
        if stop.reason is not None:  # an import can swallow the KeyboardInterrupt
            raise KeyboardInterrupt
        return _run(job, stop)
    except OSError as error:
        if not _refused(error, job):
            raise
        raise TrainingError(storage_failure(error, job.out)) from error
    except KeyboardInterrupt:
        return JobResult(job.out, stop.reason or "SIGINT")


def _run(job: PreparedJob, stop: StopRequest) -> JobResult:
    with ExitStack() as stack:
        stack.enter_context(interrupted_by_signals(stop))
        claims = _claim_outputs(job, stack)

        leases = [held.lease for held in claims.values()]

        def release() -> None:
            remove_unfinished_files(job.out, leases)
            for lease in leases:
                lease.release()

        # Called when Ray's processes have ended, which may have been killed in the middle of a write.
        stack.callback(remove_unfinished_files, job.out, leases)
        stack.enter_context(at_forced_exit(release))
        cluster = stack.enter_context(connect(job.settings))
        remove_temporary_files(job.out)  # of a driver that was killed
        try:
            backbones, comparison = _open(job, cluster, claims, stack)
        except OSError as error:
            if job.settings.resume or any(held.begun for held in claims.values()) or not _refused(error, job):
                raise
            raise TrainingError(
                f"{os_error_text(error)}; make room or repair it; the run has not begun"
            ) from error
        for backbone in backbones:
            run = backbone.prepared.run
            begin_variants(backbone.tracker, run, run.depths, undecided=undecided_settings(run))
        _log_opening(job, backbones)
        if comparison is not None:
            describe_comparison(job, comparison)
        for line in following_lines((comparison or backbones[0].tracker).ui_pages()):
            log.info(line)
        cpus = cpus_of_each(len(backbones), cluster, job.settings.placement.gpus_per_stage)
        for backbone in backbones:
            with backbone.lines():
                describe_beginning(backbone, log_estimate(backbone, cluster, cpus))
        if not job.compares:
            _search(backbones[0], cluster, stop)
        if stop.reason is None:
            train_backbones(backbones, stop, record_progress)
        if stop.reason is not None and not all(backbone.closed for backbone in backbones):
            trackers = [backbone.tracker for backbone in backbones if not backbone.closed]
            trackers += [] if comparison is None else [comparison]
            for tracker in trackers:
                tracker.request_end("KILLED")
            for tracker in trackers:
                tracker.finish("KILLED")
            return JobResult(job.out, stop.reason)
        measure_pending_latencies(backbones)
        if comparison is None:
            (backbone,) = backbones
            run = backbone.prepared.run
            closing = closing_lines(
                job.out, run.depths, backbone.tracker.ui_pages(), run.backbone.registered_by
            )
            return JobResult(job.out, None, backbone.table, tuple(closing))
        claims[job.out].lease.check()
        table, results = record_comparison(job, backbones, comparison)
        failed = tuple(f"{result.name} failed: {result.failed}" for result in results if result.failed)
        closing = several_closing_lines(job.out, results, comparison.ui_pages())
        comparison.finish("FAILED" if failed else "FINISHED")
        return JobResult(job.out, None, table, tuple(closing), failed)


def _refused(error: OSError, job: PreparedJob) -> bool:
    """Whether an error of the system is a disk that is full or read-only, or of the output directory."""
    return is_disk_error(error) or is_of_folder(error, job.out)


def connect(settings: Settings) -> AbstractContextManager[ClusterResources]:
    """The cluster that the stages live on, connected inside the context; or this machine. Raises ClusterError."""
    if settings.placement.backend == "ray":
        return ray_cluster()
    return nullcontext(ClusterResources(float(os.cpu_count() or 1), float(torch.cuda.device_count())))


def _claim_outputs(job: PreparedJob, stack: ExitStack) -> dict[Path, Claim]:
    """Hold the output directory of the job, and those of the backbones that are still to be trained. Raises OutputError."""
    claims = {}
    if job.compares:
        claims[job.out] = stack.enter_context(claim(job.out, job.settings))
    for backbone in job.backbones:
        if not backbone.finished:
            run = backbone.run
            claims[run.out] = stack.enter_context(claim(run.out, run.settings, run.fingerprint))
    return claims


def _open(
    job: PreparedJob, cluster: ClusterResources, claims: Mapping[Path, Claim], stack: ExitStack
) -> tuple[list[BackboneRun], Tracker | None]:
    """The backbones that are still to be trained, and the comparison above several, in their folders and in MLflow."""
    waiting = [
        backbone.recorded_as(claims[backbone.run.out].record)
        for backbone in job.backbones
        if not backbone.finished
    ]
    if job.compares:
        layouts = shared_layouts(waiting, cluster, job.settings.placement.gpus_per_stage)
    else:
        layouts = [single_layouts(waiting[0], cluster)]
    precisions = [
        resolve_precision(prepared.run.settings, stages[0])
        for prepared, stages in zip(waiting, layouts, strict=True)
    ]
    for prepared, precision in zip(waiting, precisions, strict=True):
        check_precision(prepared.run.out, precision, prepared.run.record)
    comparison = open_comparison(job, cluster, claims[job.out], stack) if job.compares else None
    width = max(len(prepared.name) for prepared in job.backbones)
    backbones = [
        open_backbone_run(
            prepared,
            stages,
            precision,
            cluster,
            comparison,
            prepared.name.ljust(width),
            claims[prepared.run.out],
            stack,
        )
        for prepared, stages, precision in zip(waiting, layouts, precisions, strict=True)
    ]
    return backbones, comparison


def _log_opening(job: PreparedJob, backbones: Sequence[BackboneRun]) -> None:
    """What is about to happen; the images are the same for all backbones and stand there once."""
    if job.compares and job.settings.search.trials:
        log.info(
            f"no search: every backbone is trained with the settings as they are (search.trials "
            f"{job.settings.search.trials} is for one backbone)"
        )
    for prepared in job.backbones:
        if prepared.finished:
            log.info("%s: already finished, skipped", prepared.name)
    images_line = ""
    for backbone in backbones:
        *lines, _ = opening_lines(backbone.prepared.run, backbone.prepared, backbone.layouts[0])
        for line in lines:
            if line == images_line:
                continue
            if line.startswith(f"{job.settings.data.source}: "):
                images_line = line
                for shared_line in (line, *data_notes(backbone.prepared)):
                    log.info(shared_line)
            else:
                with backbone.lines():
                    log.info(line.removeprefix(f"{backbone.name}: "))
    log.info("output: %s", short_path(job.out))


def _search(backbone: BackboneRun, cluster: ClusterResources, stop: StopRequest) -> None:
    """The search that comes before the training, if one is due; the backbone goes on with the best settings."""
    run = backbone.prepared.run
    if search_due(run.settings, run.out):
        best = run_search(
            backbone.prepared, cluster, backbone.precision, backbone.tracker, stop, backbone.lease
        )
        if best is None:
            return
        backbone.prepared = best if run.record is None else best.recorded_as(run.record)
        log_settings(best.run, backbone.tracker, write_settings(best.run))
    searched = finished_search(run.out)
    if searched is not None:
        record_search(backbone.tracker, backbone.prepared.run, searched)
