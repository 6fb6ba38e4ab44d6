"""How good and how dear each depth variant is, by one protocol for every model that is compared.

One embedding everywhere: the mean of the patch tokens after the final norm, all tokens visible, float32. Nearest
neighbours and linear probe are fitted on the train split and scored on the test split, which nothing else has seen; without
labels RankMe of the train split takes their place.
Returns records and logs nothing; knows neither Ray nor MLflow. Random initialisation and truncations of another run
are measured by giving their models to the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.batch_norms import gather_statistics
from bim.orchestrator.evaluation.features import (
    MAX_IMAGES,
    Embedder,
    build_embedders,
    embed,
    embedded,
    labelled,
    subsample,
)
from bim.orchestrator.evaluation.metrics import linear_probe, rankme, score, standard_error, weighted_knn
from bim.orchestrator.evaluation.model_cost import device_name, gflops, latencies_ms, latency_ms, num_params
from bim.orchestrator.evaluation.records import DepthReport, Scores

RANK_IMAGES = 8_192
"""The same for RankMe, of the train split: at least 2,048 or all there are."""

RAW_SIDE = 64
"""Raw pixels of larger images are averaged over cells until no side is longer: 64 x 64 x 3 is 12,288 features."""

RAW_VALUES = 2**28
"""Pixel values of a split held at once (float32, 1 GiB): of more images a part is drawn from the seed."""


def evaluate_variants(
    variants: Mapping[int, nn.Module],
    source: Source,
    splits: Splits,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    batch_size: int = 256,
    latency: bool = True,
) -> list[DepthReport]:
    """Measure every variant, by depth. Each image is decoded once for all of them.

    variants: depth -> model whose `forward_features` and `forward_head` give the embedding (`embed`). They are left on
    `device` in evaluation mode, batch norms with statistics of whole training images (`batch_norms`). size: (height, width).
    Without labels RankMe is measured in place of the accuracies.
    Raises ValueError if a split has no readable image, or embeddings are not finite.
    """
    gather_statistics(variants, source, splits.train, size, mean, std, device, seed, batch_size)
    embedders = build_embedders(variants, mean, std, device)
    worth: dict[int, dict[str, Any]]
    if source.labels is not None:
        scores = _scores(
            embedders, source, splits, size, device, k, temperature, seed, batch_size, MAX_IMAGES
        )
        worth = {depth: asdict(found) for depth, found in scores.items()}
    else:
        ranks, ranked = rankme_by_depth(embedders, source, splits.train, size, device, seed, batch_size)
        worth = {depth: {"rankme": rank, "n_ranked": ranked} for depth, rank in ranks.items()}
    times = {batch: latencies_ms(variants, size, batch, device) if latency else {} for batch in (1, 64)}
    return [
        DepthReport(
            depth=depth,
            params=num_params(model),
            gflops=gflops(model, size),
            latency_ms_b1=times[1].get(depth),
            latency_ms_b64=times[64].get(depth),
            **worth[depth],
            image_size=size,
            device=device_name(device) if latency else "",
        )
        for depth, model in sorted(variants.items())
    ]


def raw_pixels(
    source: Source,
    splits: Splits,
    size: tuple[int, int],
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | None = None,
) -> Scores:
    """The same scores for no network at all: the pixels of each image, 0..1, as its embedding.

    Pixels at `size`, averaged over square cells if a side is longer than `RAW_SIDE`. Raises ValueError if the source has
    no labels.
    """
    if source.labels is None:
        raise ValueError(f"{source.name} has no labels to score raw pixels by")
    cell = -(-max(size) // RAW_SIDE)
    limit = min(MAX_IMAGES, RAW_VALUES // (3 * -(-size[0] // cell) * -(-size[1] // cell)))

    def pixels(images: np.ndarray) -> Tensor:
        return F.avg_pool2d(torch.from_numpy(images).float() / 255.0, cell, ceil_mode=True).flatten(1)

    device = device or torch.device("cpu")
    return _scores({0: pixels}, source, splits, size, device, k, temperature, seed, batch_size, limit)[0]


def _scores(
    embedders: Mapping[int, Embedder],
    source: Source,
    splits: Splits,
    size: tuple[int, int],
    device: torch.device,
    k: int,
    temperature: float,
    seed: int,
    batch_size: int,
    limit: int,
) -> dict[int, Scores]:
    """Every embedding fitted on the train split and scored on the test split, at most `limit` images of each."""
    train, train_y = labelled(embedders, source, subsample(splits.train, limit, seed), size, batch_size)
    test, test_y = labelled(embedders, source, subsample(splits.test, limit, seed), size, batch_size)
    train_y, test_y = train_y.to(device), test_y.to(device)
    return {
        name: score(train[name].to(device), train_y, test[name].to(device), test_y, k, temperature, seed)
        for name in embedders
    }


def rankme_by_depth(
    embedders: Mapping[int, Embedder],
    source: Source,
    train: np.ndarray,
    size: tuple[int, int],
    device: torch.device,
    seed: int,
    batch_size: int,
) -> tuple[dict[int, float], int]:
    """RankMe of every embedding by name, and the number of images, at most `RANK_IMAGES` of `train`, that it is of.

    Raises ValueError if none of them can be read, or an embedding is not finite.
    """
    features, numbers = embedded(embedders, source, subsample(train, RANK_IMAGES, seed), size, batch_size)
    return {name: rankme(x.to(device)) for name, x in features.items()}, len(numbers)


__all__ = [
    "DepthReport",
    "Scores",
    "embed",
    "evaluate_variants",
    "gflops",
    "latency_ms",
    "linear_probe",
    "num_params",
    "rankme",
    "rankme_by_depth",
    "raw_pixels",
    "standard_error",
    "weighted_knn",
]
