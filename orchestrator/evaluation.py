"""How good and how dear each depth variant is, by one protocol for every model that is compared.

One embedding everywhere: the mean of the patch tokens after the final norm, all tokens visible, float32. Nearest
neighbours and linear probe are fitted on the train split and scored on the test split, which nothing else has seen; without
labels RankMe of the train split takes their place.
Returns records and logs nothing; knows neither Ray nor MLflow. Random initialisation and truncations of another run
are measured by giving their models to the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.seeding import generator
from models.tokens import normalize_images
from orchestrator.batch_norms import gather_statistics
from orchestrator.cost import device_name, gflops, latencies_ms, latency_ms, num_params
from orchestrator.data.batches import eval_images
from orchestrator.data.sources import Source
from orchestrator.data.splits import Splits
from orchestrator.probes import Scores, linear_probe, rankme, score, standard_error, weighted_knn

MAX_IMAGES = 50_000
"""Images taken of a split, drawn from the seed where there are more: decoding a million to judge a run takes hours."""

RANK_IMAGES = 8_192
"""The same for RankMe, of the train split: at least 2,048 or all there are."""

RAW_SIDE = 64
"""Raw pixels of larger images are averaged over cells until no side is longer: 64 x 64 x 3 is 12,288 features."""

RAW_VALUES = 2**28
"""Pixel values of a split held at once (float32, 1 GiB): of more images a part is drawn from the seed."""


@dataclass(frozen=True)
class DepthReport:
    """One depth variant, measured.

    Args:
        depth: layers.
        params: parameters, fixed positions too.
        gflops: 2 x multiply-accumulates / 1e9 of one image.
        latency_ms_b1, latency_ms_b64: median milliseconds of a batch of 1 and of 64; None if not measured.
        knn_top1, probe_top1: test accuracies in 0..1; None if the data has no labels.
        knn_se, probe_se: their standard errors.
        n_test: images they were counted on.
        rankme: effective rank of the embeddings of `n_ranked` training images, 1..width (arXiv 2210.02885); only without
            labels.
        n_ranked: images it was counted on.
        image_size: (height, width) of the images.
        device: what the latencies were measured on.
    """

    depth: int
    params: int
    gflops: float
    latency_ms_b1: float | None = None
    latency_ms_b64: float | None = None
    knn_top1: float | None = None
    probe_top1: float | None = None
    knn_se: float | None = None
    probe_se: float | None = None
    n_test: int = 0
    image_size: tuple[int, int] | None = None
    device: str = ""
    rankme: float | None = None
    n_ranked: int = 0

    def metrics(self) -> dict[str, float]:
        """What was measured, by the names under which it is logged and sorted."""
        values = {
            "knn_top1": self.knn_top1,
            "knn_top1_se": self.knn_se,
            "linear_top1": self.probe_top1,
            "linear_top1_se": self.probe_se,
            "rankme": self.rankme,
            "params": float(self.params),
            "gflops": self.gflops,
            "latency_b1_ms": self.latency_ms_b1,
            "latency_b64_ms": self.latency_ms_b64,
        }
        return {name: value for name, value in values.items() if value is not None}


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
    embedders = embedders_of(variants, mean, std, device)
    worth: dict[int, dict[str, Any]]
    if source.labels is not None:
        scores = _scores(
            embedders, source, splits, size, device, k, temperature, seed, batch_size, MAX_IMAGES
        )
        worth = {depth: asdict(found) for depth, found in scores.items()}
    else:
        ranks, ranked = ranks_of(embedders, source, splits.train, size, device, seed, batch_size)
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


def embed(
    model: nn.Module,
    batches: Iterable[np.ndarray],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> Tensor:
    """Embeddings of uint8 images, batches of (B, 3, H, W) -> (n, D) float32 on the CPU.

    The mean of the patch tokens after the model's final norm, in timm's terms `global_pool="avg", fc_norm=False`; the
    model is on `device`, in evaluation mode.
    """
    embedder = _embedder(model, mean, std, device)
    return torch.cat([embedder(images) for images in batches])


Embedder = Callable[[np.ndarray], Tensor]
"""(B, 3, H, W) uint8 -> (B, D) float32 on the CPU."""


def embedders_of(
    variants: Mapping[int, nn.Module], mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> dict[int, Embedder]:
    """What embeds images by each variant, which is left on `device` in evaluation mode."""
    return {depth: _embedder(model.to(device).eval(), mean, std, device) for depth, model in variants.items()}


def _embedder(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Embedder:
    @torch.inference_mode()
    def embedding(images: np.ndarray) -> Tensor:
        x = normalize_images(torch.from_numpy(images).to(device), mean, std)
        pooled: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
        return pooled.cpu()

    return embedding


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
    train, train_y = labelled(embedders, source, drawn(splits.train, limit, seed), size, batch_size)
    test, test_y = labelled(embedders, source, drawn(splits.test, limit, seed), size, batch_size)
    train_y, test_y = train_y.to(device), test_y.to(device)
    return {
        name: score(train[name].to(device), train_y, test[name].to(device), test_y, k, temperature, seed)
        for name in embedders
    }


def ranks_of(
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
    features, numbers = embedded(embedders, source, drawn(train, RANK_IMAGES, seed), size, batch_size)
    return {name: rankme(x.to(device)) for name, x in features.items()}, len(numbers)


def labelled(
    embedders: Mapping[int, Embedder],
    source: Source,
    indices: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
) -> tuple[dict[int, Tensor], Tensor]:
    """`embedded`, and the labels (n,) of the images; the source has labels."""
    features, numbers = embedded(embedders, source, indices, size, batch_size)
    assert source.labels is not None
    return features, torch.from_numpy(source.labels[numbers])


def embedded(
    embedders: Mapping[int, Embedder],
    source: Source,
    indices: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
) -> tuple[dict[int, Tensor], np.ndarray]:
    """Embeddings (n, D) by name, and numbers (n,), of the images that can be read; each is decoded once.

    Raises ValueError if none of them can be read.
    """
    features: dict[int, list[Tensor]] = {name: [] for name in embedders}
    kept = []
    for found, images in eval_images(source, indices, size, batch_size):
        kept.append(found)
        for name, embedder in embedders.items():
            features[name].append(embedder(images))
    if not kept:
        raise ValueError(f"no image of a split of {source.name} could be read, so nothing can be scored")
    return {name: torch.cat(parts) for name, parts in features.items()}, np.concatenate(kept)


def drawn(indices: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of the image numbers, a sample that depends on the seed alone; sorted."""
    if len(indices) <= limit:
        return indices
    chosen = torch.randperm(len(indices), generator=generator(seed, "evaluation"))[:limit].numpy()
    return np.sort(indices[chosen])


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
    "ranks_of",
    "raw_pixels",
    "standard_error",
    "weighted_knn",
]
