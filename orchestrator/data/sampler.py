"""In which order an epoch visits its images: a function of (seed, epoch) alone, so that any position can be found
again by arithmetic. For `TrainBatches`; reads no data.

Sources whose images cost the same wherever they lie get a full permutation. Sources that are read in chunks (Parquet
row groups) get chunks in random order, and a full shuffle inside each window of consecutive chunks of that order: a
reader that can hold one window in memory then reads every chunk once per epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bim.models.seeding import generator


@dataclass(frozen=True)
class Chunks:
    """Runs of images that are read together. starts: (G + 1,) int64, chunk g holds images starts[g]..starts[g+1]-1;
    window: how many chunks the source keeps in memory, at least 1."""

    starts: np.ndarray
    window: int


def epoch_order(indices: np.ndarray, seed: int, epoch: int, chunks: Chunks | None = None) -> np.ndarray:
    """The images of one epoch in their order. indices: (n,) sorted image numbers -> (n,) the same numbers, shuffled."""
    gen = generator(seed, "order", epoch)
    shuffled = indices[torch.randperm(len(indices), generator=gen).numpy()]
    if chunks is None or len(chunks.starts) - 1 <= chunks.window:
        return shuffled
    present, chunk = np.unique(
        np.searchsorted(chunks.starts, shuffled, side="right") - 1, return_inverse=True
    )  # only chunks that hold one of `indices` take part
    rank = torch.randperm(len(present), generator=gen).numpy()
    return shuffled[np.argsort(rank[chunk] // chunks.window, kind="stable")]
