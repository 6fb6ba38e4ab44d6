"""One checkpoint of a training scored: every depth on the validation split, and a picture of what the decoders see."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from bim.orchestrator.data.source import Source
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.files import temporary_folder
from bim.orchestrator.jobs.evaluate_checkpoint import decoding_workers
from bim.orchestrator.jobs.reconstructions import save_reconstruction_grid
from bim.orchestrator.runs.checkpoints import committed_folder
from bim.orchestrator.runs.depth_scores import images_of_a_score
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.resolve import eval_config
from bim.orchestrator.search.objective import KNN_TRAIN_IMAGES, KNN_VAL_IMAGES, score_weights
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.checkpoint import load_weights
from bim.orchestrator.training.spec import PretrainSpec

VAL_FRACTION = 0.2
"""Fraction of the images of a score that are of the validation split."""


@dataclass(frozen=True)
class ScoreTask:
    """A checkpoint and how it is scored.

    Args:
        checkpoint: committed folder, or its URL.
        depths: layers of the variants.
        limits: images of the train and of the validation split at most.
        title: of the picture.
        device: "cpu" or "cuda".
        threads: torch CPU threads; None: as the process has them.
        visible_gpus: `CUDA_VISIBLE_DEVICES` of a process that Ray gave no GPU; None: as it is.
    """

    spec: PretrainSpec
    data: DataSpec
    evaluation: EvalConfig
    checkpoint: str
    depths: tuple[int, ...]
    limits: tuple[int, int]
    title: str
    device: str = "cpu"
    threads: int | None = None
    visible_gpus: str | None = None


@dataclass(frozen=True)
class ScoreResult:
    """What a task gave.

    Args:
        metric, by_depth, images: as in `bim.orchestrator.runs.depth_scores.DepthScores`.
        picture: PNG of the reconstructions of all depths; empty if no image can be read.
    """

    metric: str
    by_depth: dict[int, float]
    images: int
    picture: bytes


def score_task(
    run: ResolvedRun, layout: StageLayout, depths: Sequence[int], step: int, epoch: int
) -> ScoreTask:
    """How the checkpoint after `step` updates is scored, at the end of `epoch`."""
    return ScoreTask(
        spec=run.spec,
        data=run.data,
        evaluation=eval_config(run.settings),
        checkpoint=str(committed_folder(run.out, step)),
        depths=tuple(depths),
        limits=score_limits(run),
        title=f"{run.settings.name}, epoch {epoch} of {run.settings.schedule.epochs}",
        device="cuda" if layout.gpus else "cpu",
    )


def score_limits(run: ResolvedRun) -> tuple[int, int]:
    """Images of the train and of the validation split that one score takes at most."""
    images = images_of_a_score(run.settings, run.phases, run.total_steps)
    val = min(KNN_VAL_IMAGES, int(VAL_FRACTION * images))
    return min(KNN_TRAIN_IMAGES, images - val), val


OpenData = Callable[[DataSpec], tuple[Source, Splits]]


def score_depths(task: ScoreTask, open_data: OpenData = DataSpec.open) -> ScoreResult:
    """Score every depth and draw the reconstructions.

    Raises:
        DataError: a split has no readable image.
        UnscorableError: embeddings are not finite.
        StorageError: the checkpoint cannot be read.
    """
    if task.visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.visible_gpus
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    backbone = open_spec_backbone(task.spec)
    weights = load_weights(task.checkpoint, task.spec)
    device = torch.device(task.device)
    inputs = EvalInputs(
        *open_data(task.data),
        size=backbone.image_size,
        mean=task.spec.mean,
        std=task.spec.std,
        device=device,
        config=task.evaluation,
        workers=decoding_workers(task.data.workers, task.device, task.threads),
    )
    score = score_weights(backbone, weights, inputs, task.depths, task.limits)
    with temporary_folder("bim-scores-") as folder:
        path = folder / "reconstructions.png"
        save_reconstruction_grid(task.spec, backbone, weights, inputs, path, {}, task.title)
        picture = path.read_bytes() if path.exists() else b""
    return ScoreResult(score.metric, score.by_depth, score.images, picture)


def score_depths_of_one_run(task: ScoreTask) -> ScoreResult:
    """`score_depths` in a process that scores the checkpoints of one run and nothing else: its images stay open."""
    return score_depths(task, _opened)


@lru_cache(maxsize=1)
def _opened(data: DataSpec) -> tuple[Source, Splits]:
    return data.open()
