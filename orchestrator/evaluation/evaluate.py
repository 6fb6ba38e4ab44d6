"""Evaluation of depth variants: quality and cost, by one protocol for every model that is compared.

The embedding is the mean of the patch tokens after the final norm, all tokens visible, float32. Nearest neighbors and
linear probe are fitted on the train split and scored on the test split, which nothing else uses; without labels RankMe of
the train split takes their place. Random initialization and truncations of another run are measured by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bim.orchestrator.data.splits import can_score
from bim.orchestrator.evaluation.batch_norms import gather_statistics
from bim.orchestrator.evaluation.features import (
    MAX_IMAGES,
    Embedder,
    build_embedders,
    extract_features,
    extract_labeled_features,
)
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.metrics import level_with_best, rankme, score
from bim.orchestrator.evaluation.model_cost import device_name, gflops, latencies_ms, num_params
from bim.orchestrator.evaluation.progress import part, report
from bim.orchestrator.evaluation.records import DepthReport, Scores

RANKME_IMAGES = 8_192
"""Images of the train split that RankMe is computed on, drawn from the seed where there are more."""

RAW_SIDE = 64
"""Raw pixels of larger images are averaged over cells until no side is longer: 64 x 64 x 3 is 12,288 features."""

RAW_VALUES = 2**28
"""Pixel values of a split held at once (float32, 1 GiB): of more images a part is drawn from the seed."""


def evaluate_variants(
    variants: Mapping[int, nn.Module],
    inputs: EvalInputs,
    bad: dict[str, str] | None = None,
) -> list[DepthReport]:
    """Measure every variant, by depth. Each image is decoded once for all of them.

    variants: depth -> model whose `forward_features` and `forward_head` give the embedding. They are left on
    `inputs.device` in evaluation mode, batch norms with statistics of whole training images (`batch_norms`).
    Without labels RankMe is measured in place of the accuracies. bad: takes the unreadable images, by sample id.
    Raises TooManyCorruptImagesError above `inputs.config.max_bad_fraction`, DataError if a split has no readable image,
    UnscorableError if embeddings are not finite.
    """
    size, device, latency = inputs.size, inputs.device, inputs.config.latency
    unreadable = gather_statistics(variants, inputs)
    if bad is not None:
        bad.update(unreadable)
    embedders = build_embedders(variants, inputs)
    metrics: dict[int, dict[str, Any]]
    if can_score(inputs.source, inputs.splits):
        scores = _scores(embedders, inputs, MAX_IMAGES, bad)
        levels = level_with_best({depth: of_depth.knn_correct for depth, of_depth in scores.items()})
        metrics = {
            depth: {**of_depth.metrics(), "n_test": of_depth.n_test, "level_with_best": levels[depth]}
            for depth, of_depth in scores.items()
        }
    else:
        ranks, num_images = rankme_by_depth(embedders, inputs, bad)
        metrics = {depth: {"rankme": rank, "n_ranked": num_images} for depth, rank in ranks.items()}
    report("costs")
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


def raw_pixels(inputs: EvalInputs) -> Scores:
    """The same scores for no network at all: the pixels of each image, 0..1, as its embedding.

    Pixels at `inputs.size`, averaged over square cells if a side is longer than `RAW_SIDE`. Raises ValueError if the source
    has no labels.
    """
    size = inputs.size
    if not can_score(inputs.source, inputs.splits):
        raise ValueError(f"{inputs.source.name} has no labels to score raw pixels by")
    cell = -(-max(size) // RAW_SIDE)
    limit = min(MAX_IMAGES, RAW_VALUES // (3 * -(-size[0] // cell) * -(-size[1] // cell)))

    def pixels(images: np.ndarray) -> Tensor:
        return F.avg_pool2d(torch.from_numpy(images).float() / 255.0, cell, ceil_mode=True).flatten(1)

    return _scores({0: pixels}, inputs, limit)[0]


def rankme_by_depth(
    embedders: Mapping[int, Embedder],
    inputs: EvalInputs,
    bad: dict[str, str] | None = None,
    limit: int = RANKME_IMAGES,
) -> tuple[dict[int, float], int]:
    """RankMe of every embedding by name, and the number of training images, at most `limit`, it is computed on.

    Raises DataError if none of them can be read, UnscorableError if an embedding is not finite.
    """
    features, indices = extract_features(embedders, inputs, inputs.splits.train, limit, bad)
    return {name: rankme(x.to(inputs.device)) for name, x in features.items()}, len(indices)


def _scores(
    embedders: Mapping[int, Embedder], inputs: EvalInputs, limit: int, bad: dict[str, str] | None = None
) -> dict[int, Scores]:
    """Every embedding fitted on the train split and scored on the test split, at most `limit` images of each."""
    device, splits = inputs.device, inputs.splits
    with part("the train split"):
        train, train_y = extract_labeled_features(embedders, inputs, splits.train, limit, bad)
    with part("the test split"):
        test, test_y = extract_labeled_features(embedders, inputs, splits.test, limit, bad)
    train_y, test_y = train_y.to(device), test_y.to(device)
    scores = {}
    for number, name in enumerate(embedders, start=1):
        report(f"kNN and linear probe of model {number} of {len(embedders)}")
        scores[name] = score(train[name].to(device), train_y, test[name].to(device), test_y, inputs.config)
    return scores
