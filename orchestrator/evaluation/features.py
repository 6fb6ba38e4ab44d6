"""Images to features: mean patch tokens of a model, all tokens visible, at one fixed size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from bim.models.seeding import generator
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.data.splits import labeled
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.progress import report

MAX_IMAGES = 50_000
"""Images taken of a split, drawn from the seed where there are more: decoding a million takes hours."""


Embedder = Callable[[np.ndarray], Tensor]
"""(B, 3, H, W) uint8 -> (B, D) float32 on the CPU."""


def build_embedders(variants: Mapping[int, nn.Module], inputs: EvalInputs) -> dict[int, Embedder]:
    """Depth -> function that embeds images by that variant, which is left on `inputs.device` in evaluation mode.

    The embedding is the mean of the patch tokens after the model's final norm, in timm's terms `global_pool="avg",
    fc_norm=False`.
    """
    return {depth: _embedder(model.to(inputs.device).eval(), inputs) for depth, model in variants.items()}


def _embedder(model: nn.Module, inputs: EvalInputs) -> Embedder:
    @torch.inference_mode()
    def embedding(images: np.ndarray) -> Tensor:
        x = inputs.normalized(torch.from_numpy(images))
        pooled: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
        return pooled.cpu()

    return embedding


def extract_labeled_features(
    embedders: Mapping[int, Embedder],
    inputs: EvalInputs,
    indices: np.ndarray,
    limit: int,
    bad: dict[str, str] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """`extract_features` of the images that have a label, and their labels (n,); the source has labels."""
    source = inputs.source
    features, read = extract_features(embedders, inputs, labeled(source, indices), limit, bad)
    assert source.labels is not None
    return features, torch.from_numpy(source.labels[read])


def extract_features(
    embedders: Mapping[int, Embedder],
    inputs: EvalInputs,
    indices: np.ndarray,
    limit: int,
    bad: dict[str, str] | None = None,
) -> tuple[dict[int, Tensor], np.ndarray]:
    """Embeddings (n, D) by name, and indices (n,), of at most `limit` images that can be read; each is decoded once.

    bad: takes the images that cannot be read, by sample id, with the reason. Raises TooManyCorruptImagesError if they are
    more than `inputs.config.max_bad_fraction`, DataError if none can be read.
    """
    features: dict[int, list[Tensor]] = {name: [] for name in embedders}
    read = []
    config = inputs.config
    sample = subsample(indices, limit, config.seed)
    met = BadImages(config.max_bad_fraction)
    for batch_indices, images in eval_images(inputs.source, sample, inputs.size, config.batch_size, met):
        read.append(batch_indices)
        for name, embedder in embedders.items():
            features[name].append(embedder(images))
        report(f"{sum(map(len, read))} of {len(sample)} images")
    if bad is not None:
        bad.update(met.reasons)
    if not read:
        raise DataError(
            f"no image of a split of {inputs.source.name} could be read, so nothing can be scored"
        )
    return {name: torch.cat(parts) for name, parts in features.items()}, np.concatenate(read)


def subsample(indices: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """(n,) -> (min(n, limit),): at most `limit` of the indices, a sample that depends on the seed alone; sorted."""
    if len(indices) <= limit:
        return indices
    permutation = torch.randperm(len(indices), generator=generator(seed, "evaluation"))
    return np.sort(indices[permutation[:limit].numpy()])
