"""Images to features: mean patch tokens of a model, all tokens visible, at one fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from bim.models.seeding import generator
from bim.models.tokens import normalize_images
from bim.orchestrator.data.loader import eval_images
from bim.orchestrator.data.source import Source

MAX_IMAGES = 50_000
"""Images taken of a split, drawn from the seed where there are more: decoding a million to judge a run takes hours."""


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


def build_embedders(
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


def subsample(indices: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of the image numbers, a sample that depends on the seed alone; sorted."""
    if len(indices) <= limit:
        return indices
    chosen = torch.randperm(len(indices), generator=generator(seed, "evaluation"))[:limit].numpy()
    return np.sort(indices[chosen])
