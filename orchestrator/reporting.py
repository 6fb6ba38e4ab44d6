"""What a finished run tells: opening lines, the depth variants and the summary in MLflow and in the output directory.

Turns records of the other parts into text and into calls of the tracker; measures nothing.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.masking import visible_counts
from orchestrator.assess import Assessment
from orchestrator.command_line import SAVED_SETTINGS
from orchestrator.comparison import ALL_COLUMNS, MemberResult, comparison_rows, comparison_table
from orchestrator.comparison_picture import comparison_figure
from orchestrator.config import settings_to_mapping
from orchestrator.contradictions import without_effect
from orchestrator.family import Family, Prepared
from orchestrator.model_card import CardFacts
from orchestrator.pictures import accuracy_latency_figure, loss_curves_figure, pareto_figure
from orchestrator.placement import Layout
from orchestrator.provenance import DataRecord, Provenance
from orchestrator.recipes import DEFAULT_RECIPE
from orchestrator.run_notes import DepthRecord, depth_rows, fenced, loading_note, results_table
from orchestrator.schedules import peak_rate
from orchestrator.search_progress import wrapped
from orchestrator.search_results import (
    BEST,
    FOLDER,
    METRIC_NAMES,
    TABLE,
    SearchResult,
    best_line,
    changes_of_best,
    counted,
    note_rows,
)
from orchestrator.settings import Settings
from orchestrator.summary import params_text, render_table, summary_rows, write_summary
from orchestrator.tracking import Tracker
from orchestrator.training_cost import block_gflops

DEAR = 2.0
"""Cost of all decoders over that of all encoders from which on it is told."""

FEW_MASKS = 100
"""Fewer different masks than these are told at the start; 16 units, 4 of them visible, have 1,820."""

DIGITS_PX = 64
"""The largest image, in pixels, to which the scanned digits are worth enlarging; they have 8 x 8."""


def data_record(prepared: Prepared) -> DataRecord:
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


def card_facts(family: Family, provenance: Provenance) -> CardFacts:
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
        "training never sees (README, Pyramids)"
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
    advice = "lower decoder.dim or raise decoder.throw_ratio there (README, Pyramids)"
    if family.backbone.encode == "all":  # its decoders add no mask tokens that they could throw
        advice = "lower decoder.dim there, or take fewer blocks (README, Pyramids)"
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


def record_depths(tracker: Tracker, family: Family, found: Assessment, series: str = "") -> None:
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
    figure = pareto_figure(result, METRIC_NAMES[result.metric])
    if figure is not None:
        tracker.log_picture(figure, "pareto")
    tags: dict[str, object] = {f"search.best.{key}": value for key, value in changes_of_best(result).items()}
    score = result.best.score
    tags |= {"search.trials": counted(result.rows), "search.best": f"trial {result.best.number}"}
    tracker.set_tags(tags | ({} if score is None else {"search.best.score": f"{score:.4g}"}))


def record_summary(
    tracker: Tracker,
    family: Family,
    found: Assessment,
    truncated: Assessment | None,
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
        before = f"\n\nThe search: {counted(searched.rows)}; {best_line(searched)}\n\n{results_table(note_rows(searched))}"
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


def _mean_scores(found: Assessment) -> dict[str, float]:
    """Accuracies, or RankMe without labels, averaged over the depths: one number per run to sort the runs by."""
    return {
        f"mean_{key}": statistics.mean(report.metrics()[key] for report in found.reports)
        for key in ("knn_top1", "linear_top1", "rankme")
        if all(key in report.metrics() for report in found.reports)
    }


def closing_lines(out: Path, depths: Sequence[int], ui: str) -> list[str]:
    """Where everything is, and the line that opens the MLflow UI."""
    folder = short_path(out)
    command, _, page = ui.partition("   then open ")
    return [
        f"models:   {folder}/variants/depth{depths[0]:02d} ... depth{depths[-1]:02d}, opened in Python by",
        f"  timm.create_model('local-dir:{folder}/variants/depth{depths[-1]:02d}', pretrained=True)",
        f"results:  {folder}/summary.csv, {folder}/pictures",
        *([f"compare:  {command}, then open", f"  {page}"] if page else [f"compare:  {command}"]),
    ]


def several_closing_lines(out: Path, results: Sequence[MemberResult], ui: str) -> list[str]:
    """`closing_lines` of a run with several backbones."""
    folder, lines = short_path(out), []
    finished = [result for result in results if result.failed is None]
    if finished:
        last = finished[-1]
        depth = last.trained[-1]["depth"]
        lines = closing_lines(out / last.name, [int(row["depth"] or 0) for row in last.trained], ui)[2:]
        lines = [
            f"models:   {folder}/BACKBONE/variants, opened in Python by",
            f"  timm.create_model('local-dir:{folder}/{last.name}/variants/depth{depth:02d}', pretrained=True)",
            f"results:  {folder}/summary.csv, {folder}/pictures/backbones.png",
            *lines[1:],
        ]
    if len(finished) < len(results):
        lines += [
            f"again:    {_resume_command(out)} goes on with those that failed;",
            f"  one that fails for its settings: first remove its folder {folder}/BACKBONE, then change them in --backbones",
        ]
    return lines


def _resume_command(out: Path) -> str:
    return f"python {sys.argv[0]} --out {shlex.quote(short_path(out))} --resume"


def stopped_line(signal_name: str, out: Path) -> str:
    """That a run was ended early, and how to continue it."""
    if not (out / SAVED_SETTINGS).exists():
        return f"stopped by {signal_name} before anything was written"
    return f"stopped by {signal_name}; go on with: {_resume_command(out)}"


def short_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
