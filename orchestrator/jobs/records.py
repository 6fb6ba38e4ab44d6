"""What a job records of a backbone in its output directory and in MLflow."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bim.models.backbones.backbone import BlockInfo
from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.config.transforms import flat, settings_to_yaml, with_changes
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.files import atomic_write
from bim.orchestrator.jobs.backbone_run import BASELINE_SERIES, BackboneRun, clear_failure
from bim.orchestrator.jobs.reconstructions import GRID
from bim.orchestrator.jobs.search_job import search_due
from bim.orchestrator.reporting.figures.accuracy import accuracy_latency_figure
from bim.orchestrator.reporting.figures.loss_curves import loss_curves_figure
from bim.orchestrator.reporting.figures.pareto import pareto_figure
from bim.orchestrator.reporting.figures.style import add_title, picture_title
from bim.orchestrator.reporting.log import log_to_file
from bim.orchestrator.reporting.summary import render_table, summary_rows, write_summary
from bim.orchestrator.runs.output_dir import Claim
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun
from bim.orchestrator.runs.provenance import DataRecord, collect
from bim.orchestrator.runs.signals import at_forced_exit
from bim.orchestrator.search.record import BEST, FOLDER, TABLE, finished_search
from bim.orchestrator.search.results import SearchResult, best_line, changes_of_best, note_rows, status_counts
from bim.orchestrator.text import params_text, redact
from bim.orchestrator.tracking.descriptions import LEVEL_TAG, depth_rows, fenced, results_table
from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.spec import Precision

EVENTS = "events.log"

SEARCH_PICTURE = "search_score_against_cost"
"""Name of the picture of a search."""

NAMED_BAD_IMAGES = 10
"""Unreadable images that the line about an evaluation names."""

log = logging.getLogger(__name__)

# -- before the training ------------------------------------------------------------------------------------------


def open_backbone_run(
    prepared: PreparedBackbone,
    layouts: list[StageLayout],
    precision: Precision,
    cluster: ClusterResources,
    parent: Tracker | None,
    label: str,
    claim: Claim,
    stack: ExitStack,
) -> BackboneRun:
    """Begin the run of a backbone in its output directory and in MLflow, and save its settings and provenance.

    Args:
        parent: of the comparison of several backbones, below which its run stands.
        label: begins its lines.
        claim: of the output directory.
        stack: closes what is opened here.

    Raises:
        TrackingError, StorageError: the run has not begun.
    """
    run = prepared.run
    provenance = collect(data_record(prepared), _resolved_settings(run, layouts[0], precision, cluster))
    run_name = run.out.name if parent is None else f"{parent.out.name}/{prepared.name}"
    with claim.begin():
        text = write_settings(run)  # before anything else: by this file --resume knows that it was begun
        tracker = stack.enter_context(open_tracker(run, run_name, None if parent is None else parent.run_id))
    stack.enter_context(at_forced_exit(tracker.end_at_once))
    stack.enter_context(log_to_file(run.out / EVENTS, label))
    # MLflow never changes a parameter, so those that the search decides wait for its end.
    undecided = tuple(run.settings.search.space) if search_due(run.settings, run.out) else ()
    log_settings(run, tracker, text, undecided)
    tracker.log_provenance(provenance)
    return BackboneRun(prepared, layouts, precision, provenance, tracker, label, lease=claim.lease)


def open_tracker(run: ResolvedRun, run_name: str, parent_run_id: str | None) -> Tracker:
    """The MLflow record of this run, continued if the run is. Raises TrackingError within seconds."""
    tracking = run.settings.tracking
    resumed = Tracker.recorded_run(run.out) if run.settings.resume else None
    return Tracker.open(
        tracking.uri, tracking.experiment, run_name, run.out, resumed, _model_name(run), parent_run_id
    )


def write_settings(run: ResolvedRun) -> str:
    """Save the settings in the output directory, from where --resume takes them. Returns the text.

    After a finished search they are those of its best trial, and a run that starts from them does not search again.
    """
    settings = with_changes(run.settings, {"resume": False, "from_scratch": False, "search.resume": False})
    if finished_search(run.out) is not None:
        settings = with_changes(settings, {"search.trials": 0})
    text = settings_to_yaml(settings)
    atomic_write(run.out / SAVED_SETTINGS, text)
    return text


def log_settings(run: ResolvedRun, tracker: Tracker, text: str, undecided: tuple[str, ...] = ()) -> None:
    """Log the settings to MLflow, without the keys in `undecided`; `text` is the whole of them as YAML."""
    if finished_search(run.out) is not None:
        undecided = (*undecided, "search.trials")  # MLflow has the number that the search was started with
    tracker.log_settings({key: v for key, v in flat(run.settings).items() if key not in undecided}, text)


def data_record(prepared: PreparedBackbone) -> DataRecord:
    """The images of a run, for its provenance and its model cards."""
    source, splits = prepared.source, prepared.splits
    return DataRecord(
        source=redact(prepared.run.settings.data.source),
        fingerprint=prepared.run.fingerprint,
        images=len(source),
        train=len(splits.train),
        val=len(splits.val),
        test=len(splits.test),
        classes=None if source.class_names is None else len(source.class_names),
    )


def _resolved_settings(
    run: ResolvedRun, layout: StageLayout, precision: Precision, cluster: ClusterResources
) -> dict[str, str]:
    """What the settings leave to the machine, for the provenance."""
    return {
        "cluster": cluster_text(cluster),
        "layers_by_block": "+".join(str(size) for size in run.spec.blocks),
        "blocks_by_stage": " | ".join(", ".join(map(str, blocks)) for blocks in layout.stage_blocks),
        "per_stage": f"{layout.gpus:g} GPU, {layout.cpus:g} CPU, {layout.threads} threads",
        "precision": precision,
    }


def cluster_text(cluster: ClusterResources) -> str:
    """`4 CPU, 1 GPU`."""
    return f"{cluster.cpus:g} CPU, {cluster.gpus:g} GPU"


def describe_beginning(backbone: BackboneRun, estimate: Sequence[str]) -> None:
    """What is trained, what it will cost, and the way to its depths, on the page of a run from its first minute.

    estimate: lines of `log_estimate`, if there are any.
    """
    run = backbone.prepared.run
    parts = [f"{_summary_sentence(backbone)} {_links(backbone)}."]
    if search_due(run.settings, run.out):
        parts.append(f"Before it a search of {run.settings.search.trials} trials.")
    if estimate:
        parts.append(fenced("\n".join(estimate)))
    backbone.tracker.describe("\n\n".join(parts))


def _summary_sentence(backbone: BackboneRun) -> str:
    """What is trained, in a sentence."""
    run, splits = backbone.prepared.run, backbone.prepared.splits
    settings, blocks = run.settings, run.backbone.blocks
    layers = "+".join(str(block.layers) for block in blocks)
    return (
        f"{settings.backbone.name}, {blocks[-1].depth} layers in {len(blocks)} block{'s' * (len(blocks) > 1)} ({layers}); "
        f"{settings.schedule.epochs} epochs of {len(splits.train):,} images of {redact(settings.data.source)}."
    )


def _links(backbone: BackboneRun) -> str:
    losses = [f"block{block.index}/loss" for block in backbone.prepared.run.backbone.blocks]
    return backbone.tracker.run_links(losses)


# -- while it runs, and at its end --------------------------------------------------------------------------------


def record_progress(backbone: BackboneRun) -> None:
    """Record what is new of a backbone, by the main thread: evaluated variants, its summary at the end, or its failure.

    What waits for its latencies is not recorded yet. Safe to call again.
    """
    if backbone.closed:
        return
    with backbone.lines(), backbone.isolated():
        if backbone.lease is not None:
            backbone.lease.check()  # evaluation and recording write into the output directory too
        if backbone.failed is None and not backbone.latency_pending:
            _record_evaluations(backbone)
            if backbone.evaluated:
                backbone.table = _record_summary(backbone)
                clear_failure(backbone)
                backbone.tracker.finish("FINISHED")
                backbone.closed = True
    if backbone.failed is not None and not backbone.closed:
        backbone.tracker.set_tags({"failed": backbone.failed})
        backbone.tracker.finish("FAILED")
        backbone.closed = True


def _record_evaluations(backbone: BackboneRun) -> None:
    for number in range(backbone.num_recorded, len(backbone.evaluations)):
        run = backbone.prepared.runs[number]
        step = backbone.tasks[number].step
        record_variants(backbone.tracker, run, backbone.evaluations[number], step, backbone.series_of(run))
        report_bad_images(backbone.evaluations[number])
        backbone.num_recorded += 1


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
        tracker.log_depth(record, _model_name(run))


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


def record_search(tracker: Tracker, result: SearchResult) -> None:
    """A finished search on the parent run: its table, its best recipe, its picture, and what it changed, as tags."""
    for name in (TABLE, BEST):
        tracker.log_file(tracker.out / FOLDER / name, FOLDER)
    figure = pareto_figure(result)
    if figure is not None:
        add_title(figure, f"{result.images} images, {result.epochs} epochs a trial")
        tracker.log_picture(figure, SEARCH_PICTURE)
    tags: dict[str, object] = {f"search.best.{key}": value for key, value in changes_of_best(result).items()}
    score = result.best.score
    tags |= {"search.trials": status_counts(result.rows), "search.best": f"trial {result.best.number}"}
    tracker.set_tags(tags | ({} if score is None else {"search.best.score": f"{score:.4g}"}))


def _record_summary(backbone: BackboneRun) -> str:
    """The table and the pictures of a backbone, in its output directory and on its MLflow page. Returns the table."""
    run, tracker = backbone.prepared.run, backbone.tracker
    evaluation, *baselines = backbone.evaluations
    baseline = baselines[0].reports if baselines else ()
    reports, random = evaluation.reports, evaluation.random
    table = render_table(evaluation, baseline)
    atomic_write(run.out / "summary.txt", table + "\n")
    for path in write_summary(summary_rows(evaluation, baseline), run.out):
        tracker.log_file(path)
    pictures = []
    figure = accuracy_latency_figure(evaluation, baseline)
    if figure is not None:
        metric = "accuracy" if reports[0].knn_top1 is not None else "rankme"
        pictures.append(f"{metric}_against_latency")
        counted = reports[0].n_test or reports[0].n_ranked
        split = "test" if reports[0].n_test else "training"
        add_title(
            figure, picture_title(run.settings.name, run.settings.data.source, f"{counted} {split} images")
        )
        tracker.log_picture(figure, pictures[-1])
    curves = {b.index: tracker.history(f"block{b.index}/loss") for b in run.backbone.blocks}
    pictures.append("loss_by_block")
    losses = loss_curves_figure(curves)
    trained = f"{len(backbone.prepared.splits.train)} training images"
    add_title(losses, picture_title(run.settings.name, run.settings.data.source, trained))
    tracker.log_picture(losses, pictures[-1])
    if (grid := run.out / "pictures" / f"{GRID}.png").exists():
        tracker.log_file(grid, "pictures")
        pictures.append(GRID)
    if means := _mean_scores(evaluation):
        tracker.log_metrics(backbone.tasks[0].step, means)
    search_note = ""
    if (searched := finished_search(run.out)) is not None:
        pictures.append(SEARCH_PICTURE)
        search_note = (
            f"\n\nThe search: {status_counts(searched.rows)}; {best_line(searched)}\n\n"
            f"{results_table(note_rows(searched))}"
        )
    records = [
        DepthRecord(report.depth, Path(), report.metrics(), series=series)
        for series, group in (("", reports), (BASELINE_SERIES, baseline), ("random", random))
        for report in group
    ]
    tracker.describe(
        f"{_summary_sentence(backbone)} {params_text(reports[-1].params)} parameters at full depth. {_links(backbone)}.\n\n"
        f"{results_table(depth_rows(records, evaluation.raw))}{search_note}\n\n"
        "Open the deepest variant without this package:",
        pictures,
        reports[-1].depth,
        _model_name(run),
    )
    return table


def _mean_scores(evaluation: EvaluationResult) -> dict[str, float]:
    """Accuracies, or RankMe without labels, averaged over the depths: one number per run to sort the runs by."""
    return {
        f"mean_{key}": statistics.mean(report.metrics()[key] for report in evaluation.reports)
        for key in ("knn_top1", "linear_top1", "rankme")
        if all(key in report.metrics() for report in evaluation.reports)
    }


def _model_name(run: ResolvedRun) -> str:
    return run.settings.tracking.model_name or run.settings.name
