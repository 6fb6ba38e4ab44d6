"""The objective of a search: quality of the embeddings of every depth, and cost of a training image.

Not the training loss, which is another quantity under another mask, target or decoder. The embedding is that of the
evaluation, on the validation split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.data.phases import Phase
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits, labeled
from bim.orchestrator.evaluation.batch_norms import gather_statistics
from bim.orchestrator.evaluation.evaluate import RANKME_IMAGES, rankme_by_depth
from bim.orchestrator.evaluation.features import build_embedders, extract_labeled_features
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.metrics import weighted_knn
from bim.orchestrator.evaluation.model_cost import forward_gflops
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.search.results import Score
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.checkpoint import load_weights
from bim.orchestrator.training.depth_variants import trained_variant
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.storage import Location

SCORED_BY = ("knn_k", "knn_temperature")
"""Settings of the evaluation that a score depends on; scores under other values cannot be compared."""

KNN_TRAIN_IMAGES = 20_000
KNN_VAL_IMAGES = 5_000
"""Labeled images of the train and the validation split that a score takes, drawn from the seed where there are more."""


def metric_of(source: Source, splits: Splits) -> str:
    """Key of the metric that trials on these images are ranked by: `knn_top1` needs labels and a validation split."""
    return "knn_top1" if len(labeled(source, splits.train)) and len(labeled(source, splits.val)) else "rankme"


def score_checkpoint(
    spec: PretrainSpec,
    images: tuple[Source, Splits],
    config: EvalConfig,
    checkpoint: Location,
    device: str = "cpu",
    workers: int = 0,
) -> Score:
    """Score every depth variant of a committed checkpoint at the backbone's own image size, all tokens visible.

    workers: processes that decode images, at most.

    Raises DataError if a split has no readable image, UnscorableError if embeddings are not finite.
    """
    backbone = open_spec_backbone(spec)
    inputs = EvalInputs(
        *images, backbone.image_size, spec.mean, spec.std, torch.device(device), config, workers
    )
    return score_weights(backbone, load_weights(checkpoint, spec), inputs)


def score_weights(
    backbone: Backbone,
    weights: list[dict[str, Tensor]],
    inputs: EvalInputs,
    depths: Sequence[int] | None = None,
    limits: tuple[int, int] = (KNN_TRAIN_IMAGES, KNN_VAL_IMAGES),
) -> Score:
    """The same for the weights of every block, as `LocalMIM.state_dict` gives them.

    Args:
        depths: layers of the variants; None: those at the ends of the blocks.
        limits: images of the train and of the validation split at most; RankMe takes as many of the train split as both.
    """
    splits, device, config = inputs.splits, inputs.device, inputs.config
    depths = depths or [info.depth for info in backbone.blocks]
    variants = {depth: trained_variant(backbone, weights, depth) for depth in depths}
    gather_statistics(variants, inputs)
    embedders = build_embedders(variants, inputs)
    if metric_of(inputs.source, splits) == "rankme":
        ranks, num_images = rankme_by_depth(embedders, inputs, limit=min(RANKME_IMAGES, sum(limits)))
        return Score("rankme", ranks, num_images)
    train, train_y = extract_labeled_features(embedders, inputs, splits.train, limits[0])
    val, val_y = extract_labeled_features(embedders, inputs, splits.val, limits[1])
    train_y, val_y = train_y.to(device), val_y.to(device)

    def accuracy(depth: int) -> float:
        train_x, val_x = train[depth].to(device), val[depth].to(device)
        return weighted_knn(train_x, train_y, val_x, val_y, config.knn_k, config.knn_temperature)

    return Score("knn_top1", {depth: accuracy(depth) for depth in variants}, len(val_y))


def training_gflops(spec: PretrainSpec, phases: Sequence[Phase], epochs: int) -> float:
    """GFLOPs (2 x multiply-accumulates / 1e9) of the forward passes of one training image through all blocks and decoders.

    Averaged over the phases, each weighted by its epochs. Targets are not counted; the backward pass costs about twice as
    much as the forward pass under any settings.
    """
    backbone = open_spec_backbone(spec)
    ends = [*(phase.first_epoch for phase in phases[1:]), epochs]
    fractions = [(end - phase.first_epoch) / epochs for phase, end in zip(phases, ends, strict=True)]
    return sum(
        fraction * forward_gflops(spec, backbone, phase.size)
        for phase, fraction in zip(phases, fractions, strict=True)
    )
