"""What a job records of its results in the output directory and in MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from bim.orchestrator.config.transforms import settings_to_mapping
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.export.model_card import CardFacts
from bim.orchestrator.reporting.comparison import ALL_COLUMNS, MemberResult, comparison_rows, comparison_table
from bim.orchestrator.reporting.figures.accuracy import accuracy_latency_figure
from bim.orchestrator.reporting.figures.backbones import comparison_figure
from bim.orchestrator.reporting.figures.loss_curves import loss_curves_figure
from bim.orchestrator.reporting.figures.pareto import pareto_figure
from bim.orchestrator.reporting.summary import render_table, summary_rows, write_summary
from bim.orchestrator.runs.prepare import PreparedJob, ResolvedRun
from bim.orchestrator.runs.provenance import DataRecord, Provenance
from bim.orchestrator.search.results import (
    BEST,
    FOLDER,
    TABLE,
    SearchResult,
    best_line,
    changes_of_best,
    note_rows,
    status_counts,
)
from bim.orchestrator.text import params_text
from bim.orchestrator.tracking.descriptions import depth_rows, fenced, loading_note, results_table
from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker


def data_record(prepared: PreparedJob) -> DataRecord:
    """The images of a run, for its provenance and its model cards."""
    source, splits = prepared.source, prepared.splits
    return DataRecord(
        source=prepared.family.settings.data.source,
        fingerprint=prepared.family.fingerprint,
        images=len(source),
        train=len(splits.train),
        val=len(splits.val),
        test=len(splits.test),
        classes=None if source.class_names is None else len(source.class_names),
    )


def card_facts(family: ResolvedRun, provenance: Provenance) -> CardFacts:
    """What the model cards of a family share."""
    settings = family.settings
    return CardFacts(
        run=settings.name,
        seed=settings.seed,
        settings=settings_to_mapping(settings),
        data=provenance.data,
        code=provenance.code,
        init_from=settings.init_from,
    )


def record_depths(tracker: Tracker, family: ResolvedRun, found: EvaluationResult, series: str = "") -> None:
    """A child run and a model for every variant; `series` names a baseline's."""
    settings = family.settings
    prefix = f"{series}/" if series else ""
    name = settings.tracking.model_name or settings.name
    for report in found.reports:
        block = next(b for b in family.backbone.blocks if b.depth >= report.depth)
        curves = {
            short: tracker.history(f"{prefix}{long}")
            for short, long in (
                ("loss", f"block{block.index}/loss"),
                ("loss_always_masked", f"block{block.index}/loss_always_masked"),
                ("loss_newly_dropped", f"block{block.index}/loss_newly_dropped"),
                ("loss_kept", f"block{block.index}/loss_kept"),
                ("loss_thrown", f"block{block.index}/loss_thrown"),
                ("grad_norm", f"block{block.index}/grad_norm"),
                ("images_per_s", "images_per_s"),
            )
        }
        decoder = family.spec.decoders[block.index]
        record = DepthRecord(
            depth=report.depth,
            folder=Path(found.folders[report.depth]),
            metrics=report.metrics(),
            params={
                "depth": report.depth,
                "backbone": settings.backbone.name,
                "block": block.index,
                "mask_ratio": family.spec.mask_ratios[block.index],
                "decoder": f"{decoder.depth}x{decoder.dim}",
                "epochs": settings.schedule.epochs,
                "seed": settings.seed,
            },
            curves={key: curve for key, curve in curves.items() if curve},
            pictures=[Path(found.pictures[report.depth])] if report.depth in found.pictures else [],
            step=family.total_steps,
            series=series,
        )
        tracker.log_depth(record, name)


def record_search(tracker: Tracker, result: SearchResult) -> None:
    """A finished search on the parent run: its table, its best recipe, its picture, and what it changed, as tags."""
    for name in (TABLE, BEST):
        tracker.log_file(tracker.out / FOLDER / name, FOLDER)
    figure = pareto_figure(result, result.info.name)
    if figure is not None:
        tracker.log_picture(figure, "pareto")
    tags: dict[str, object] = {f"search.best.{key}": value for key, value in changes_of_best(result).items()}
    score = result.best.score
    tags |= {"search.trials": status_counts(result.rows), "search.best": f"trial {result.best.number}"}
    tracker.set_tags(tags | ({} if score is None else {"search.best.score": f"{score:.4g}"}))


def record_summary(
    tracker: Tracker,
    family: ResolvedRun,
    found: EvaluationResult,
    truncated: EvaluationResult | None,
    searched: SearchResult | None = None,
) -> str:
    """The table and the pictures of a run, in its output directory and on its MLflow page. Returns the table as text."""
    baseline = () if truncated is None else truncated.reports
    rows = summary_rows(found.reports, found.random, found.raw, baseline)
    table = render_table(found.reports, found.random, found.raw, baseline)
    (family.out / "summary.txt").write_text(table + "\n", encoding="utf-8")
    for path in write_summary(rows, family.out):
        tracker.log_file(path)
    figure = accuracy_latency_figure(found.reports, found.random, found.raw, baseline)
    pictures = ["loss_by_block"]
    if figure is not None:
        worth = "accuracy" if found.reports[0].knn_top1 is not None else "rankme"
        pictures.insert(0, f"{worth}_against_latency")
        tracker.log_picture(figure, f"{worth}_against_latency")
    curves = {b.index: tracker.history(f"block{b.index}/loss") for b in family.backbone.blocks}
    tracker.log_picture(loss_curves_figure(curves), "loss_by_block")
    settings = family.settings
    scores = _mean_scores(found)
    if scores:
        tracker.log_metrics(family.total_steps, scores)
    name = settings.tracking.model_name or settings.name
    deepest = found.reports[-1].depth
    records = [DepthRecord(r.depth, Path(found.folders[r.depth]), r.metrics()) for r in found.reports]
    if truncated is not None:
        records += [
            DepthRecord(r.depth, Path(truncated.folders[r.depth]), r.metrics(), series="mae")
            for r in truncated.reports
        ]
    records += [DepthRecord(r.depth, Path(), r.metrics(), series="random") for r in found.random]
    before = ""
    if searched is not None:
        pictures.insert(0, "pareto")
        outcome = f"The search: {status_counts(searched.rows)}; {best_line(searched)}"
        before = f"\n\n{outcome}\n\n{results_table(note_rows(searched))}"
    tracker.describe(
        f"{params_text(found.reports[-1].params)} parameters at full depth, {settings.backbone.name}, "
        f"{len(family.spec.blocks)} blocks, {settings.schedule.epochs} epochs of {settings.data.source}.\n\n"
        f"{results_table(depth_rows(records))}\n\nOpen a variant without this package:\n\n"
        f"{loading_note(name, f'depth{deepest}', tracker.store_to_name)}{before}",
        pictures,
    )
    return table


def record_comparison(
    tracker: Tracker,
    results: Sequence[MemberResult],
    runs: Mapping[str, str | None],
    tested: int,
    device: str,
) -> str:
    """The table and the picture of several backbones, in the output directory and on their common MLflow page.

    runs: name -> MLflow's run of that backbone. Returns the table as text.
    """
    table = comparison_table(results, tested, device)
    (tracker.out / "summary.txt").write_text(table + "\n", encoding="utf-8")
    for path in write_summary(comparison_rows(results), tracker.out, ALL_COLUMNS):
        tracker.log_file(path)
    figure = comparison_figure(results, device)
    if figure is not None:
        tracker.log_picture(figure, "backbones")
    tracker.set_tags({f"backbone.{r.name}": "failed" if r.failed else "finished" for r in results})
    page = f"#/experiments/{tracker.experiment_id}/runs/"
    links = ", ".join(
        f"[{name}]({page}{run}?workflowType=machine_learning)"
        for name, run in runs.items()
        if run is not None
    )
    note = f"{len(results)} backbones side by side: {links}\n\n{fenced(table)}"
    tracker.describe(note, [] if figure is None else ["backbones"])
    return table


def _mean_scores(found: EvaluationResult) -> dict[str, float]:
    """Accuracies, or RankMe without labels, averaged over the depths: one number per run to sort the runs by."""
    return {
        f"mean_{key}": statistics.mean(report.metrics()[key] for report in found.reports)
        for key in ("knn_top1", "linear_top1", "rankme")
        if all(key in report.metrics() for report in found.reports)
    }
