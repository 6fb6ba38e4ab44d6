"""The training images whose embeddings are nearest to those of a few images; labels play no part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bim.orchestrator.evaluation.features import Embedder, SplitFeatures
from bim.orchestrator.evaluation.progress import report_again

NEIGHBORS = 5


@dataclass(frozen=True)
class Queries:
    """Images that neighbors are searched for.

    numbers: (q,) of the images in their source; images: (q, 3, H, W) uint8.
    """

    numbers: np.ndarray
    images: np.ndarray


def nearest_images(
    embedders: Mapping[int, Embedder], train: SplitFeatures, queries: Queries, count: int = NEIGHBORS
) -> dict[int, np.ndarray]:
    """Depth -> (q, k) numbers of the training images with the largest cosine similarity, the nearest first.

    Args:
        embedders: by depth.
        train: embeddings of training images by the same depths.
        queries: the images; one that is a training image itself is not its own neighbor.
        count: k, which is less where there are fewer training images.

    Returns nothing where a query would have no neighbor.
    """
    itself = torch.from_numpy(queries.numbers[:, None] == train.indices[None, :])  # (q, n)
    k = min(count, len(train.indices) - int(itself.sum(dim=1).max()))
    if k < 1:
        return {}
    nearest = {}
    for depth, embedder in embedders.items():
        report_again()
        bank = train.by_depth[depth].float()
        query = F.normalize(embedder(queries.images).float(), dim=1)
        similarity = (query @ bank.T) / bank.norm(dim=1).clamp_min(1e-12)
        similarity[itself] = -torch.inf
        nearest[depth] = train.indices[similarity.topk(k, dim=1).indices.numpy()]
    return nearest
