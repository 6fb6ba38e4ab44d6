"""Images to features: mean patch tokens of a model, all tokens visible, at one fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bim.models.seeding import generator
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.data.splits import labeled
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.progress import report, report_again

MAX_IMAGES = 50_000
"""Images taken of a split, drawn from the seed where there are more: decoding a million takes hours."""


Embedder = Callable[[np.ndarray], Tensor]
"""(B, 3, H, W) uint8 -> (B, D) float32 on the CPU."""


@dataclass(frozen=True)
class EmbedderSet:
    """What embeds the same images, by depth, and how many images of a split at most."""

    by_depth: Mapping[int, Embedder]
    limit: int = MAX_IMAGES


@dataclass(frozen=True)
class SplitFeatures:
    """Embeddings of the images of a split that could be read.

    Args:
        by_depth: depth -> (n, D) float32 on the CPU, one row per image.
        indices: (n,) int64, the numbers of the images in the source.
    """

    by_depth: dict[int, Tensor]
    indices: np.ndarray


def build_embedders(variants: Mapping[int, nn.Module], inputs: EvalInputs) -> dict[int, Embedder]:
    """Depth -> function that embeds images by that variant, which is left on `inputs.device` in evaluation mode.

    The embedding is the mean of the patch tokens after the model's final norm, in timm's terms `global_pool="avg",
    fc_norm=False`.
    """
    return {depth: _embedder(model.to(inputs.device).eval(), inputs) for depth, model in variants.items()}


def _embedder(model: nn.Module, inputs: EvalInputs) -> Embedder:
    @torch.inference_mode()
    def embedding(images: np.ndarray) -> Tensor:
        with _reporting_again(model):
            x = inputs.normalized(torch.from_numpy(images))
            pooled: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
        return pooled.cpu()

    return embedding


@contextmanager
def _reporting_again(model: nn.Module) -> Iterator[None]:
    """Inside, a listener is asked at every layer: on a CPU a batch takes minutes."""

    def ask(module: nn.Module, args: Any) -> None:
        report_again()

    handles = [module.register_forward_pre_hook(ask) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    features = extract_sets({"": EmbedderSet(embedders, limit)}, inputs, indices, bad)[""]
    return features.by_depth, features.indices


def extract_sets(
    sets: Mapping[str, EmbedderSet],
    inputs: EvalInputs,
    indices: np.ndarray,
    bad: dict[str, str] | None = None,
) -> dict[str, SplitFeatures]:
    """The embeddings of several sets of embedders by name, each image decoded once for all of them.

    The sample of a set with a smaller limit is a part of that of a larger one. A set gets the features that it would get
    alone; in batches of other sizes, if another set takes more images.

    bad and errors: as of `extract_features`, counted over all images that are decoded.
    """
    config = inputs.config
    sample = subsample(indices, max(one.limit for one in sets.values()), config.seed)
    parts = {
        name: _SetFeatures(one, subsample(indices, one.limit, config.seed)) for name, one in sets.items()
    }
    bad_images, read = BadImages(config.max_bad_fraction), 0
    batches = eval_images(
        inputs.source, sample, inputs.size, config.batch_size, bad_images, inputs.workers, report_again
    )
    with closing(batches):
        for batch_indices, images in batches:
            for features in parts.values():
                features.add(batch_indices, images)
            read += len(images)
            report(f"{read} of {len(sample)} images")
    if bad is not None:
        bad.update(bad_images.reasons)
    if not all(features.count for features in parts.values()):
        raise DataError(
            f"no image of a split of {inputs.source.name} could be read, so nothing can be scored"
        )
    return {name: features.result() for name, features in parts.items()}


class _SetFeatures:
    """Embeddings of one set, written row by row where they stay, so that they are held once."""

    def __init__(self, embedders: EmbedderSet, sample: np.ndarray) -> None:
        self.count = 0
        self._embedders = embedders.by_depth
        self._sample = sample
        self._rows: dict[int, Tensor] = {}
        self._read: list[np.ndarray] = []

    def add(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Embed the images (B, 3, H, W), of these numbers, that are in the sample."""
        chosen = np.isin(indices, self._sample)
        if not chosen.all():
            indices, images = indices[chosen], images[chosen]
        if not len(indices):
            return
        for depth, embedder in self._embedders.items():
            embeddings = embedder(images)
            if depth not in self._rows:
                self._rows[depth] = torch.empty(
                    len(self._sample), embeddings.shape[1], dtype=embeddings.dtype
                )
            self._rows[depth][self.count : self.count + len(embeddings)] = embeddings
        self._read.append(indices)
        self.count += len(indices)

    def result(self) -> SplitFeatures:
        rows = {depth: values[: self.count] for depth, values in self._rows.items()}
        return SplitFeatures(rows, np.concatenate(self._read))


def subsample(indices: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """(n,) -> (min(n, limit),): at most `limit` of the indices, a sample that depends on the seed alone; sorted."""
    if len(indices) <= limit:
        return indices
    permutation = torch.randperm(len(indices), generator=generator(seed, "evaluation"))
    return np.sort(indices[permutation[:limit].numpy()])
