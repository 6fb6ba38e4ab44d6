"""A finished checkpoint evaluated: every depth variant built, exported, measured and pictured, beside its random start.

Runs where the GPU is, in a process of its own, and returns plain records.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.evaluation.evaluate import evaluate_sets
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.metrics import UnscorableError
from bim.orchestrator.evaluation.model_cost import device_name, latencies_ms
from bim.orchestrator.evaluation.progress import report as report_progress
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.export.timm_folder import export_decoder, export_variant, folder_name, rewrite_card
from bim.orchestrator.files import make_folder, storage_errors
from bim.orchestrator.jobs.evaluation_task import EvaluationTask
from bim.orchestrator.jobs.neighbors import NeighborPicture
from bim.orchestrator.jobs.reconstructions import save_all_reconstructions
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.checkpoint import load_weights
from bim.orchestrator.training.depth_variants import random_variants, trained_variant
from bim.orchestrator.training.errors import TrainingError

TRAINED, RANDOM = "trained models", "random starts"
"""Names of the model sets of an evaluation, in its progress."""


def evaluate_checkpoint(task: EvaluationTask) -> EvaluationResult:
    """Export, measure and picture every depth variant of a checkpoint.

    Raises:
        TrainingError: the images have changed or cannot be read, or nothing can be scored; the last checkpoint stays.
        StorageError: the file system of the output directory refuses.
    """
    try:
        return _evaluate(task)
    except DataError as error:
        raise TrainingError(f"evaluation: {error}; --resume evaluates the last checkpoint again") from error
    except UnscorableError as error:
        raise TrainingError(f"evaluation: {error}; the last checkpoint stays") from error


def _evaluate(task: EvaluationTask) -> EvaluationResult:
    if task.threads is not None:
        torch.set_num_threads(min(task.threads, os.cpu_count() or 1))
    out = Path(task.out)
    backbone, weights, variants = _load(task)
    inputs = EvalInputs(
        *task.data.open(),
        size=backbone.image_size,
        mean=task.spec.mean,
        std=task.spec.std,
        device=torch.device(task.device),
        config=task.evaluation,
        workers=decoding_workers(task.data.workers, task.device, task.threads),
    )
    bad: dict[str, str] = {}
    sets = {TRAINED: variants}
    if task.with_baselines:
        sets[RANDOM] = random_variants(task.spec, backbone, task.depths)
    neighbors = NeighborPicture(variants, inputs, bad)
    reports, raw = evaluate_sets(
        sets,
        inputs,
        bad,
        untimed={RANDOM},
        with_raw_pixels=task.with_baselines,
        on_train_features=lambda train: neighbors.search(train[TRAINED]),
    )
    measured, random = tuple(reports[TRAINED]), tuple(reports.get(RANDOM, ()))
    result, folders = EvaluationResult(measured, random, raw.metrics() if raw else {}, bad_images=bad), {}
    for name in ("variants", "decoders"):  # an output directory that is gone by now is not made again
        make_folder(out / name)
    for report in measured:
        report_progress(f"export of depth {report.depth}")
        folder = out / "variants" / folder_name(report.depth)
        variant = variants[report.depth]
        with storage_errors(folder):
            export_variant(backbone, report.depth, variant, folder, task.card, result)
        folders[report.depth] = str(folder)
    for k, state in enumerate(weights):
        decoder = {
            name.removeprefix("decoder."): value
            for name, value in state.items()
            if name.startswith("decoder.")
        }
        export_decoder(decoder, out / "decoders" / f"block-{k}.safetensors")
    report_progress("pictures")
    neighbors.save(out / "pictures", task.card.run)
    pictures = save_all_reconstructions(
        task.spec, backbone, weights, inputs, out / "pictures", bad, task.card.run
    )
    return replace(result, folders=folders, pictures=pictures)


def decoding_workers(workers: int, device: str, threads: int | None) -> int:
    """Processes that decode images for an evaluation, at most.

    As many as for the training; on CPUs no more than the evaluation has threads, and none beside a single one.

    Args:
        workers: `data.workers`.
        device: "cpu" or "cuda".
        threads: torch CPU threads of the evaluation; None: as this process has them.
    """
    if device != "cpu":
        return workers
    threads = threads or torch.get_num_threads()
    return min(workers, threads) if threads > 1 else 0


def add_latency(task: EvaluationTask, result: EvaluationResult) -> EvaluationResult:
    """The same result with latencies, measured now, and on the model cards: after an evaluation beside other work.

    Args:
        result: what `evaluate_checkpoint` returned for the same task.
    """
    device = torch.device(task.device)
    backbone, _, variants = _load(task)
    variants = {depth: variants[depth].to(device).eval() for depth in sorted(variants)}
    batch_1, batch_64 = (latencies_ms(variants, backbone.image_size, batch, device) for batch in (1, 64))
    reports = tuple(
        replace(
            report,
            latency_b1_ms=batch_1[report.depth],
            latency_b64_ms=batch_64[report.depth],
            device=device_name(device),
        )
        for report in result.reports
    )
    timed = replace(result, reports=reports)
    rewrite_cards(task, timed)
    return timed


def rewrite_cards(task: EvaluationTask, result: EvaluationResult) -> None:
    """Write the model cards of a result again, alone: the exported weights hold statistics gathered by the evaluation."""
    backbone = open_spec_backbone(task.spec)
    for depth, folder in result.folders.items():
        rewrite_card(backbone, depth, Path(folder), task.card, result)


def _load(task: EvaluationTask) -> tuple[Backbone, list[dict[str, Tensor]], dict[int, nn.Module]]:
    """The backbone, the weights of every block, and the variants that they make by depth."""
    backbone = open_spec_backbone(task.spec)
    weights = load_weights(task.checkpoint, task.spec)
    return backbone, weights, {depth: trained_variant(backbone, weights, depth) for depth in task.depths}
