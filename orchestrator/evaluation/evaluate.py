"""Evaluation of depth variants: quality and cost, by one protocol for every model that is compared.

The embedding is the mean of the patch tokens after the final norm, all tokens visible, float32. Nearest neighbors and
linear probe are fitted on the train split and scored on the test split, which nothing else uses; without labels RankMe of
the train split takes their place. Random initialization and truncations of another run are measured by the same function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bim.orchestrator.data.splits import can_score, labeled
from bim.orchestrator.evaluation.batch_norms import gather_statistics
from bim.orchestrator.evaluation.features import (
    MAX_IMAGES,
    Embedder,
    EmbedderSet,
    SplitFeatures,
    build_embedders,
    extract_sets,
)
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.metrics import level_with_best, rankme, score
from bim.orchestrator.evaluation.model_cost import device_name, gflops, latencies_ms, num_params
from bim.orchestrator.evaluation.progress import part, report
from bim.orchestrator.evaluation.records import DepthReport, EvalConfig, Scores

RANKME_IMAGES = 8_192
"""Images of the train split that RankMe is computed on, drawn from the seed where there are more."""

RAW_SIDE = 64
"""Raw pixels of larger images are averaged over cells until no side is longer: 64 x 64 x 3 is 12,288 features."""

RAW_PIXELS = "raw pixels"
"""Name of the embedder set without a model."""

RAW_VALUES = 2**28
"""Pixel values of a split held at once (float32, 1 GiB): of more images a part is drawn from the seed."""

OnTrainFeatures = Callable[[Mapping[str, SplitFeatures]], None]
"""Takes the embeddings of training images by the name of the set."""

log = logging.getLogger(__name__)


def evaluate_variants(
    variants: Mapping[int, nn.Module],
    inputs: EvalInputs,
    bad: dict[str, str] | None = None,
) -> list[DepthReport]:
    """Measure every variant, by depth; `evaluate_sets` of a single set."""
    return evaluate_sets({"": variants}, inputs, bad)[0][""]


def evaluate_sets(
    sets: Mapping[str, Mapping[int, nn.Module]],
    inputs: EvalInputs,
    bad: dict[str, str] | None = None,
    untimed: Collection[str] = (),
    with_raw_pixels: bool = False,
    on_train_features: OnTrainFeatures | None = None,
) -> tuple[dict[str, list[DepthReport]], Scores | None]:
    """Measure several sets of models, such as trained ones and random starts. Each image is decoded once for all of them.

    Args:
        sets: name -> depth -> model whose `forward_features` and `forward_head` give the embedding. They are left on
            `inputs.device` in evaluation mode, batch norms with statistics of whole training images (`batch_norms`).
        bad: takes the unreadable images, by sample id.
        untimed: sets without latencies, whatever the configuration says.
        with_raw_pixels: also score raw pixels, where there are labels (`raw_pixels`).
        on_train_features: called with the embeddings of training images by set, before they are scored and let go.

    Returns the reports of every set by depth, and the scores of raw pixels. Without labels RankMe is measured in place of
    the accuracies.

    Raises TooManyCorruptImagesError above `inputs.config.max_bad_fraction`, DataError if a split has no readable image,
    UnscorableError if embeddings are not finite.
    """
    models = {(name, depth): model for name, variants in sets.items() for depth, model in variants.items()}
    unreadable = gather_statistics(models, inputs)
    if bad is not None:
        bad.update(unreadable)
    embedders = {name: build_embedders(variants, inputs) for name, variants in sets.items()}
    metrics: dict[str, dict[int, dict[str, Any]]]
    raw: Scores | None = None
    if can_score(inputs.source, inputs.splits):
        embedder_sets = {name: EmbedderSet(by_depth, MAX_IMAGES) for name, by_depth in embedders.items()}
        if with_raw_pixels:
            embedder_sets[RAW_PIXELS] = _raw_pixel_set(inputs.size)
        scores = _scores(embedder_sets, inputs, bad, on_train_features)
        if with_raw_pixels:
            raw = scores.pop(RAW_PIXELS)[0]
        metrics = {name: _measured(by_depth) for name, by_depth in scores.items()}
    else:
        ranks = _ranks(embedders, inputs, bad, RANKME_IMAGES, on_train_features)
        metrics = {
            name: {depth: {"rankme": rank, "n_ranked": count} for depth, rank in by_depth.items()}
            for name, (by_depth, count) in ranks.items()
        }
    reports = {}
    for name, variants in sets.items():
        with part(name):
            latency = inputs.config.latency and name not in untimed
            reports[name] = _reports(variants, metrics[name], inputs, latency)
    return reports, raw


def raw_pixels(inputs: EvalInputs) -> Scores:
    """The same scores for no network at all: the pixels of each image, 0..1, as its embedding.

    Pixels at `inputs.size`, averaged over square cells if a side is longer than `RAW_SIDE`. Raises ValueError if the source
    has no labels.
    """
    if not can_score(inputs.source, inputs.splits):
        raise ValueError(f"{inputs.source.name} has no labels to score raw pixels by")
    return _scores({RAW_PIXELS: _raw_pixel_set(inputs.size)}, inputs)[RAW_PIXELS][0]


def rankme_by_depth(
    embedders: Mapping[int, Embedder],
    inputs: EvalInputs,
    bad: dict[str, str] | None = None,
    limit: int = RANKME_IMAGES,
) -> tuple[dict[int, float], int]:
    """RankMe of every embedding by name, and the number of training images, at most `limit`, it is computed on.

    Raises DataError if none of them can be read, UnscorableError if an embedding is not finite.
    """
    return _ranks({"": embedders}, inputs, bad, limit)[""]


def _raw_pixel_set(size: tuple[int, int]) -> EmbedderSet:
    """Raw pixels as the embedding of depth 0, of as many images as `RAW_VALUES` holds."""
    cell = -(-max(size) // RAW_SIDE)

    def pixels(images: np.ndarray) -> Tensor:
        return F.avg_pool2d(torch.from_numpy(images).float() / 255.0, cell, ceil_mode=True).flatten(1)

    limit = min(MAX_IMAGES, RAW_VALUES // (3 * -(-size[0] // cell) * -(-size[1] // cell)))
    return EmbedderSet({0: pixels}, limit)


def _measured(scores: Mapping[int, Scores]) -> dict[int, dict[str, Any]]:
    """The scores of one set by depth, as fields of `DepthReport`; depths are compared by the images that they get right."""
    levels = level_with_best({depth: of_depth.knn_correct for depth, of_depth in scores.items()})
    return {
        depth: {**of_depth.metrics(), "n_test": of_depth.n_test, "level_with_best": levels[depth]}
        for depth, of_depth in scores.items()
    }


def _ranks(
    embedders: Mapping[str, Mapping[int, Embedder]],
    inputs: EvalInputs,
    bad: dict[str, str] | None,
    limit: int,
    on_train_features: OnTrainFeatures | None = None,
) -> dict[str, tuple[dict[int, float], int]]:
    """RankMe of every embedder of every set by depth, and the number of training images that it is computed on."""
    sets = {name: EmbedderSet(by_depth, limit) for name, by_depth in embedders.items()}
    with part("the train split"):
        features = extract_sets(sets, inputs, inputs.splits.train, bad)
    if on_train_features is not None:
        on_train_features(features)
    return {
        name: ({depth: rankme(x.to(inputs.device)) for depth, x in one.by_depth.items()}, len(one.indices))
        for name, one in features.items()
    }


def _scores(
    sets: Mapping[str, EmbedderSet],
    inputs: EvalInputs,
    bad: dict[str, str] | None = None,
    on_train_features: OnTrainFeatures | None = None,
) -> dict[str, dict[int, Scores]]:
    """Every embedding of every set fitted on the train split and scored on the test split, by name and depth."""
    source, splits = inputs.source, inputs.splits
    with part("the train split"):
        train = extract_sets(sets, inputs, labeled(source, splits.train), bad)
    if on_train_features is not None:
        on_train_features(train)
    with part("the test split"):
        test = extract_sets(sets, inputs, labeled(source, splits.test), bad)
    scores = {}
    for name in sets:
        with part(name):
            scores[name] = _set_scores(train.pop(name), test.pop(name), inputs)
    return scores


def _set_scores(train: SplitFeatures, test: SplitFeatures, inputs: EvalInputs) -> dict[int, Scores]:
    """Every embedding of a set, by depth; features are let go once they are scored."""
    labels = inputs.source.labels
    assert labels is not None
    train_y, test_y = (torch.from_numpy(labels[split.indices]) for split in (train, test))
    depths, scores = list(train.by_depth), dict[int, Scores]()
    for number, depth in enumerate(depths, start=1):
        report(f"kNN and linear probe of model {number} of {len(depths)}")
        train_x, test_x = (split.by_depth.pop(depth) for split in (train, test))
        scores[depth] = _score_on(inputs.device, (train_x, train_y, test_x, test_y), inputs.config)
    return scores


def _score_on(
    device: torch.device, parts: tuple[Tensor, Tensor, Tensor, Tensor], config: EvalConfig
) -> Scores:
    """`score` on the device, or on the CPU if the features do not fit beside what else is there.

    parts: features and labels of the training images and of the test images, on the CPU.
    """
    try:
        train_x, train_y, test_x, test_y = parts
        return score(train_x.to(device), train_y.to(device), test_x.to(device), test_y.to(device), config)
    except torch.cuda.OutOfMemoryError:
        log.warning(
            "the features of %d images do not fit into the memory of the GPU; they are scored on the CPU",
            len(parts[1]) + len(parts[3]),
        )
    torch.cuda.empty_cache()
    return score(*parts, config)


def _reports(
    variants: Mapping[int, nn.Module],
    metrics: Mapping[int, Mapping[str, Any]],
    inputs: EvalInputs,
    latency: bool,
) -> list[DepthReport]:
    """The reports of one set of models: their metrics by depth, and what they cost."""
    report("costs")
    size, device = inputs.size, inputs.device
    times = {batch: latencies_ms(variants, size, batch, device) if latency else {} for batch in (1, 64)}
    return [
        DepthReport(
            depth=depth,
            params=num_params(model),
            gflops=gflops(model, size),
            latency_b1_ms=times[1].get(depth),
            latency_b64_ms=times[64].get(depth),
            **metrics[depth],
            image_size=size,
            device=device_name(device) if latency else "",
        )
        for depth, model in sorted(variants.items())
    ]
