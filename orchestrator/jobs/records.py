"""What a job records of a backbone in its output directory and in MLflow."""

from __future__ import annotations

import statistics
from pathlib import Path

from bim.orchestrator.evaluation.metric_info import QUALITY
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.files import atomic_write
from bim.orchestrator.jobs.backbone_run import BASELINE_SERIES, BackboneRun, clear_failure
from bim.orchestrator.jobs.neighbors import NEIGHBORS_PICTURE
from bim.orchestrator.jobs.open_backbone import links, model_name, summary_sentence
from bim.orchestrator.jobs.reconstructions import GRID
from bim.orchestrator.jobs.record_variants import record_variants, report_bad_images
from bim.orchestrator.reporting.figures.accuracy import accuracy_latency_figure
from bim.orchestrator.reporting.figures.loss_curves import loss_curves_figure
from bim.orchestrator.reporting.figures.pareto import pareto_figure
from bim.orchestrator.reporting.figures.style import add_title, picture_title
from bim.orchestrator.reporting.summary import render_table, summary_rows, write_summary
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.search.record import BEST, FOLDER, TABLE, finished_search
from bim.orchestrator.search.results import SearchResult, best_line, changes_of_best, note_rows, status_counts
from bim.orchestrator.text import params_text
from bim.orchestrator.tracking.descriptions import depth_rows, results_table
from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker

SEARCH_PICTURE = "search_score_against_cost"
"""Name of the picture of a search."""


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


def record_search(tracker: Tracker, run: ResolvedRun, result: SearchResult) -> None:
    """A finished search on the parent run: its table, its best recipe, its picture, and what it changed, as tags."""
    for name in (TABLE, BEST):
        tracker.log_file(tracker.out / FOLDER / name, FOLDER)
    figure = pareto_figure(result)
    if figure is not None:
        counted = f"{result.images} images, {result.epochs} epochs a trial"
        add_title(figure, picture_title(run.settings.name, run.settings.data.source, counted))
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
    for name in (GRID, NEIGHBORS_PICTURE):
        if (picture := run.out / "pictures" / f"{name}.png").exists():
            tracker.log_file(picture, "pictures")
            pictures.append(name)
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
        f"{summary_sentence(backbone)} {params_text(reports[-1].params)} parameters at full depth. {links(backbone)}.\n\n"
        f"{results_table(depth_rows(records, evaluation.raw))}{search_note}\n\n"
        "Open the deepest variant without this package:",
        pictures,
        reports[-1].depth,
        model_name(run),
    )
    return table


def _mean_scores(evaluation: EvaluationResult) -> dict[str, float]:
    """Accuracies, or RankMe without labels, averaged over the depths: one number per run to sort the runs by."""
    return {
        f"mean_{info.key}": statistics.mean(report.metrics()[info.key] for report in evaluation.reports)
        for info in QUALITY
        if all(info.key in report.metrics() for report in evaluation.reports)
    }
