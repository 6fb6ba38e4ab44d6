"""The picture of nearest neighbors: six fixed images, and the training images most similar to each by every depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from bim.orchestrator.data.loader import BadImages, eval_images
from bim.orchestrator.evaluation.features import SplitFeatures, build_embedders
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.neighbors import Queries, nearest_images
from bim.orchestrator.jobs.reconstructions import picture_images, shown_images
from bim.orchestrator.reporting.figures.neighbors import neighbors_figure
from bim.orchestrator.reporting.figures.style import write_png

NEIGHBORS_PICTURE = "nearest_neighbors"
"""Name of the picture."""

SIMILARITY_NOTE = "by the cosine similarity of mean patch tokens; labels play no part"


class NeighborPicture:
    """The picture of one evaluation: `search` while it has the embeddings of training images, then `save`.

    Without an image that can be read there is none.
    """

    def __init__(self, variants: Mapping[int, nn.Module], inputs: EvalInputs, bad: dict[str, str]) -> None:
        """bad: takes the images that cannot be read, by sample id, with the reason."""
        self._variants = variants
        self._inputs = inputs
        self._queries = Queries(*_read(inputs, picture_images(inputs), bad))
        self._nearest: dict[int, np.ndarray] = {}
        self._compared = 0

    def search(self, train: SplitFeatures) -> None:
        """Find the neighbors of each image; train: embeddings by the depths of the variants."""
        if len(self._queries.numbers):
            embedders = build_embedders(self._variants, self._inputs)
            self._nearest = nearest_images(embedders, train, self._queries)
            self._compared = len(train.indices)

    def save(self, folder: Path, title: str = "") -> None:
        """Write `nearest_neighbors.png`; title: of the run. Raises StorageError."""
        if not self._nearest:
            return
        needed = np.unique(np.concatenate([numbers.ravel() for numbers in self._nearest.values()]))
        numbers, images = _read(self._inputs, needed, {})
        pixels = dict(zip(numbers.tolist(), _rgb(images), strict=True))
        gray = np.full((*self._inputs.size, 3), 0.5)  # of an image that cannot be read any more
        by_depth = {
            depth: np.stack([[pixels.get(number, gray) for number in row] for row in rows.tolist()])
            for depth, rows in self._nearest.items()
        }
        shown = shown_images(self._inputs, len(self._queries.numbers))
        text = f"{shown}, and the nearest of {self._compared:,} training images"
        figure = neighbors_figure(
            _rgb(self._queries.images), by_depth, f"{title}: {text}" if title else text, SIMILARITY_NOTE
        )
        write_png(figure, folder / f"{NEIGHBORS_PICTURE}.png")


def _read(inputs: EvalInputs, numbers: np.ndarray, bad: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) numbers and (n, 3, H, W) uint8 images of those that can be read."""
    bad_images = BadImages()
    batches = list(eval_images(inputs.source, numbers, inputs.size, len(numbers), bad_images))
    bad.update(bad_images.reasons)
    if not batches:
        return np.empty(0, dtype=np.int64), np.empty((0, 3, *inputs.size), dtype=np.uint8)
    return batches[0]


def _rgb(images: np.ndarray) -> np.ndarray:
    """(n, 3, H, W) uint8 -> (n, H, W, 3) in 0..1."""
    return images.transpose(0, 2, 3, 1) / 255.0
