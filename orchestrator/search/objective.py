"""What a search ranks settings by: how good the embeddings of every depth are, and what an image costs in training.

Never the training loss, which is another quantity under another mask, target or decoder. The same embedding as in the
evaluation, on the validation split. Knows neither Ray nor MLflow nor pydantic; serves the trials of a search.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.data.phases import Phase
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.batch_norms import gather_statistics
from bim.orchestrator.evaluation.evaluate import rankme_by_depth
from bim.orchestrator.evaluation.features import build_embedders, labelled, subsample
from bim.orchestrator.evaluation.metrics import weighted_knn
from bim.orchestrator.evaluation.model_cost import forward_gflops
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.checkpoint import load_weights
from bim.orchestrator.training.depth_variants import trained_variant
from bim.orchestrator.training.spec import PretrainSpec

SCORED_BY = ("knn_k", "knn_temperature")
"""Settings of the evaluation that a score depends on; what was scored otherwise cannot be compared."""

KNN_TRAIN_IMAGES = 20_000
KNN_VAL_IMAGES = 5_000
"""Labelled images of the train and the validation split that a score takes, drawn from the seed where there are more."""


@dataclass(frozen=True)
class ObjectiveSpec:
    """How checkpoints are scored; the same for every trial of a search."""

    knn_k: int = 20
    knn_temperature: float = 0.07
    batch_size: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """What a checkpoint is worth; more is better.

    Args:
        metric: "knn_top1" (0..1) or "rankme" (1..width of the embedding).
        by_depth: depth in layers -> the metric of that variant.
        images: how many it was counted on.
    """

    metric: str
    by_depth: dict[int, float]
    images: int

    @property
    def mean(self) -> float:
        """Over the depths: the score of a trial."""
        return statistics.mean(self.by_depth.values())


def metric_of(source: Source, splits: Splits) -> str:
    """By what these images can be ranked: `knn_top1` needs labels and a validation split, `rankme` neither."""
    return "knn_top1" if source.labels is not None and len(splits.val) else "rankme"


def score_checkpoint(
    spec: PretrainSpec,
    images: tuple[Source, Splits],
    how: ObjectiveSpec,
    checkpoint: Path,
    device: str = "cpu",
) -> Score:
    """Score every depth variant of a committed checkpoint at the backbone's own image size, all tokens visible.

    Raises ValueError if a split has no readable image, or embeddings are not finite.
    """
    backbone = open_spec_backbone(spec)
    return score_weights(spec, backbone, load_weights(checkpoint, spec), images, how, device)


def score_weights(
    spec: PretrainSpec,
    backbone: Backbone,
    weights: list[dict[str, Tensor]],
    images: tuple[Source, Splits],
    how: ObjectiveSpec,
    device: str = "cpu",
) -> Score:
    """The same for the weights of every block, as `LocalMIM.state_dict` gives them."""
    source, splits = images
    place = torch.device(device)
    variants = {info.depth: trained_variant(backbone, weights, info.depth) for info in backbone.blocks}
    size, batch = backbone.image_size, how.batch_size
    gather_statistics(variants, source, splits.train, size, spec.mean, spec.std, place, how.seed, batch)
    embedders = build_embedders(variants, spec.mean, spec.std, place)
    if metric_of(source, splits) == "rankme":
        ranks, ranked = rankme_by_depth(embedders, source, splits.train, size, place, how.seed, batch)
        return Score("rankme", ranks, ranked)
    fit, fit_y = labelled(embedders, source, subsample(splits.train, KNN_TRAIN_IMAGES, how.seed), size, batch)
    val, val_y = labelled(embedders, source, subsample(splits.val, KNN_VAL_IMAGES, how.seed), size, batch)
    fit_y, val_y = fit_y.to(place), val_y.to(place)
    accuracies = {
        depth: weighted_knn(
            fit[depth].to(place), fit_y, val[depth].to(place), val_y, how.knn_k, how.knn_temperature
        )
        for depth in variants
    }
    return Score("knn_top1", accuracies, len(val_y))


def training_gflops(spec: PretrainSpec, phases: Sequence[Phase], epochs: int) -> float:
    """GFLOPs (2 x multiply-accumulates / 1e9) of the forward passes of one training image through all blocks and decoders.

    Averaged over the phases, each weighted by its epochs. Targets are not counted; the backward pass is about twice as
    much again, whatever the settings.
    """
    backbone = open_spec_backbone(spec)
    ends = [*(phase.first_epoch for phase in phases[1:]), epochs]
    shares = [(end - phase.first_epoch) / epochs for phase, end in zip(phases, ends, strict=True)]
    return sum(
        share * forward_gflops(spec, backbone, phase.size)
        for phase, share in zip(phases, shares, strict=True)
    )
