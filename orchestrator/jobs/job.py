"""The main job: settings in, a trained, measured, exported and recorded family of backbones out.

Composes the parts and holds no arithmetic. Everything that can be wrong with the input is found in `prepare` or before
the first actor starts; those errors are `BAD_INPUT`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import end_to_end, flat, settings_to_yaml, with_changes
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.cluster import ClusterError, ray_cluster, run_on_worker
from bim.orchestrator.distributed.placement import ClusterResources, PlacementError, StageLayout
from bim.orchestrator.evaluation.records import EvalConfig, EvaluationResult
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.jobs.evaluate_checkpoint import EvaluationTask, evaluate_checkpoint
from bim.orchestrator.jobs.records import (
    card_facts,
    data_record,
    record_depths,
    record_search,
    record_summary,
)
from bim.orchestrator.jobs.search_job import check_search, run_search, search_due
from bim.orchestrator.reporting.closing import closing_lines
from bim.orchestrator.reporting.console import Progress
from bim.orchestrator.reporting.startup import opening_lines
from bim.orchestrator.runs.output_dir import NEW_RUN_HINT, OutputError, check_output, new_output
from bim.orchestrator.runs.prepare import PreparedJob, ResolvedRun, resolve_run
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.runs.signals import Interrupted, interrupted_by_signals
from bim.orchestrator.runs.train import resolve_layout, resolve_precision, train
from bim.orchestrator.search.results import finished_search, with_best
from bim.orchestrator.tracking.open_run import TrackingError
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.spec import Precision

Say = Callable[[str], None]


BAD_INPUT = (SettingsError, DataError, OutputError, PlacementError, TrackingError, ClusterError)


@dataclass(frozen=True)
class JobResult:
    """How a job ended: `stopped` is the signal that ended it early; `table` and `closing` are what there is to show.

    failed: one sentence for every backbone of several that did not come to its end.
    """

    out: Path
    stopped: str | None
    table: str = ""
    closing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def prepare(
    settings: Settings, opened: tuple[Source, Splits] | None = None, anew: str = NEW_RUN_HINT
) -> PreparedJob:
    """Check everything that needs no cluster: backbone, data, splits, output directory.

    Args:
        opened: the images and their split, if they are open already and of the same settings.
        anew: what to do if the output directory is one of other settings.

    Raises:
        SettingsError, DataError, OutputError: one clear sentence.
    """
    settings, out = absolute(settings)
    if settings.resume or settings.search.resume:
        settings = with_best(with_changes(settings, {"resume": True}), finished_search(out))
    family, source, splits = resolve_run(settings, out, opened)
    check_output(
        out, settings, family.fingerprint, anew, lambda saved: with_best(saved, finished_search(out))
    )
    baseline = None
    if settings.baseline == "mae":
        baseline = resolve_run(end_to_end(settings), out / "baseline_mae", (source, splits))[0]
    prepared = PreparedJob(family, baseline, source, splits)
    check_search(family, prepared)
    return prepared


def absolute(settings: Settings) -> tuple[Settings, Path]:
    """Settings whose paths hold whatever directory an actor runs in, and the output directory, named if it was not."""
    out = (
        (settings.out or Path("runs") / f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        .expanduser()
        .absolute()
    )
    return with_changes(settings, {"out": str(out)} | _absolute_inputs(settings)), out


def run_job(prepared: PreparedJob, say: Say) -> JobResult:
    """Train, measure, export and record. See `JobResult`.

    Raises:
        OutputError, PlacementError, TrackingError, ClusterError: before the first actor starts.
        TrainingError: training cannot go on; the last checkpoint stays.
    """
    try:
        return _run(prepared, say)
    except KeyboardInterrupt as interrupt:  # while Ray waits, it makes a bare one of an Interrupted
        name = interrupt.name if isinstance(interrupt, Interrupted) else "SIGINT"
        return JobResult(prepared.family.out, name)


def _run(prepared: PreparedJob, say: Say) -> JobResult:
    family, baseline, settings = prepared.family, prepared.baseline, prepared.family.settings
    depths, searching = family.depths, search_due(settings, prepared.family.out)
    with ExitStack() as stack:
        cluster = cluster_of(settings, stack, say)
        stack.enter_context(interrupted_by_signals())
        layout = resolve_layout(settings, cluster)
        baseline_layout = None if baseline is None else resolve_layout(baseline.settings, cluster)
        precision = resolve_precision(settings, layout)
        provenance = collect(data_record(prepared), resolved(family, layout, precision, cluster))
        with new_output(family.out):
            tracker = stack.enter_context(open_tracker(family))
        # MLflow never changes a parameter, so those that are still to be found wait.
        keep_settings(family, tracker, without=tuple(settings.search.space) if searching else ())
        tracker.log_provenance(provenance)
        for line in opening_lines(family, prepared, layout):
            say(line)
        stop = StopRequest()
        if searching:
            found_family = run_search(family, prepared, cluster, precision, tracker, say, stop)
            if found_family is None:
                tracker.finish("KILLED")
                return JobResult(family.out, stop.reason)
            family = found_family
            keep_settings(family, tracker)
            if baseline is not None:
                alone, images = end_to_end(family.settings), (prepared.source, prepared.splits)
                baseline = resolve_run(alone, baseline.out, images)[0]
        searched = finished_search(family.out)
        if searched is not None:
            record_search(tracker, searched)
        with Progress(tracker, total_steps=family.total_steps) as progress:
            train(family, layout, precision, progress, stop)
        if stop.reason is None:
            say(f"measuring and exporting depth{'s' * (len(depths) > 1)} {', '.join(map(str, depths))}")
            found = _assess(family, layout, card_facts(family, provenance), depths)
            record_depths(tracker, family, found)
        if stop.reason is None and baseline is not None and baseline_layout is not None:
            say("the baseline: one end-to-end MAE run (K = 1), to be truncated at each depth")
            with Progress(tracker, "mae", "mae", baseline.total_steps) as progress:
                train(baseline, baseline_layout, precision, progress, stop)
        if stop.reason is not None:
            tracker.finish("KILLED")
            return JobResult(family.out, stop.reason)
        truncated = None
        if baseline is not None and baseline_layout is not None:
            facts = card_facts(baseline, provenance)
            truncated = _assess(baseline, baseline_layout, facts, depths, references=False)
            record_depths(tracker, baseline, truncated, series="mae")
        table = record_summary(tracker, family, found, truncated, searched)
        closing = closing_lines(family.out, depths, tracker.ui_hint())
    return JobResult(family.out, None, table, tuple(closing))


def resolved(
    family: ResolvedRun, layout: StageLayout, precision: Precision, cluster: ClusterResources
) -> dict[str, str]:
    """What the settings left open and this machine decided, for the record of the run."""
    return {
        "cluster": f"{cluster.cpus:g} CPU, {cluster.gpus:g} GPU",
        "layers_by_block": "+".join(str(size) for size in family.spec.blocks),
        "blocks_by_stage": " | ".join(", ".join(map(str, place)) for place in layout.places),
        "per_stage": f"{layout.gpus:g} GPU, {layout.cpus:g} CPU, {layout.threads} threads",
        "precision": precision,
    }


def keep_settings(family: ResolvedRun, tracker: Tracker, without: tuple[str, ...] = ()) -> None:
    """Write the settings into the output directory, from where --resume takes them, and into MLflow."""
    text = write_settings(family)
    if finished_search(family.out) is not None:
        without = (*without, "search.trials")  # MLflow has what was asked for
    shown = {key: value for key, value in flat(family.settings).items() if key not in without}
    tracker.log_settings(shown, text)


def write_settings(family: ResolvedRun) -> str:
    """Write the settings into the output directory, which is there. Returns the text.

    Once its search has ended, a run has what it found, and those who start from its settings need not search again.
    """
    settings = with_changes(family.settings, {"resume": False, "search.resume": False})
    if finished_search(family.out) is not None:
        settings = with_changes(settings, {"search.trials": 0})
    text = settings_to_yaml(settings)
    (family.out / SAVED_SETTINGS).write_text(text, encoding="utf-8")
    return text


def open_tracker(
    family: ResolvedRun, run_name: str | None = None, parent_run_id: str | None = None
) -> Tracker:
    """The MLflow record of this run, continued if the run is. Raises TrackingError within seconds."""
    track = family.settings.tracking
    continued = Tracker.recorded_run(family.out) if family.settings.resume else None
    name = track.model_name or family.settings.name
    title = run_name or family.out.name
    return Tracker.open(track.uri, track.experiment, title, family.out, continued, name, parent_run_id)


def cluster_of(settings: Settings, stack: ExitStack, say: Say) -> ClusterResources:
    """The cluster that the stages will live on, connected until the stack is closed; or this machine."""
    if settings.placement.backend == "ray":
        return stack.enter_context(ray_cluster(say))
    return ClusterResources(float(os.cpu_count() or 1), float(torch.cuda.device_count()))


def _assess(
    family: ResolvedRun,
    layout: StageLayout,
    card: CardFacts,
    depths: tuple[int, ...],
    references: bool = True,
) -> EvaluationResult:
    job = evaluation_task(family, layout, card, depths, references)
    on_ray = family.settings.placement.backend == "ray"
    return run_on_worker(evaluate_checkpoint, layout, job) if on_ray else evaluate_checkpoint(job)


def evaluation_task(
    family: ResolvedRun, layout: StageLayout, card: CardFacts, depths: tuple[int, ...], references: bool
) -> EvaluationTask:
    """What is to be made of the last checkpoint of a trained family."""
    settings = family.settings
    how = settings.evaluation
    return EvaluationTask(
        spec=family.spec,
        data=family.data,
        evaluation=EvalConfig(
            how.knn_k, how.knn_temperature, how.batch_size, how.latency, settings.data.split_seed
        ),
        checkpoint=str(CheckpointStore(family.out).directory(family.total_steps)),
        out=str(family.out),
        depths=depths,
        card=card,
        device="cuda" if layout.gpus else "cpu",
        references=references,
    )


def _absolute_inputs(settings: Settings) -> dict[str, str]:
    """Paths that actors must find whatever directory they run in."""
    given = {"data.source": settings.data.source, "init_from": settings.init_from}
    found = {}
    for key, value in given.items():
        # "local-dir:DIR" and "torchvision:NAME:ROOT" end in a path too.
        head, colon, path = (value or "").rpartition(":")
        if path and Path(path).exists():
            found[key] = f"{head}{colon}{Path(path).absolute()}"
    return found
