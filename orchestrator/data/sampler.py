"""The permutation of an epoch: a function of (seed, epoch) alone, so that any position is found by arithmetic.

Sources whose images cost the same everywhere get a full permutation. Sources that are read in chunks (Parquet row
groups) get chunks in random order, and a full shuffle inside each window of consecutive chunks of that order: a
reader that holds one window in memory reads every chunk once per epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bim.models.seeding import generator


@dataclass(frozen=True)
class Chunks:
    """Runs of images that are read together.

    Args:
        starts: (G + 1,) int64, chunk g holds images starts[g]..starts[g+1]-1.
        window: number of chunks that the source keeps in memory, at least 1.
    """

    starts: np.ndarray
    window: int


def epoch_permutation(indices: np.ndarray, seed: int, epoch: int, chunks: Chunks | None = None) -> np.ndarray:
    """The images of one epoch in their order: (n,) sorted image numbers -> (n,) int64, the same numbers shuffled.

    chunks: of the whole source; None: every image costs the same, wherever it stands.
    """
    gen = generator(seed, "order", epoch)
    shuffled = indices[torch.randperm(len(indices), generator=gen).numpy()]
    if chunks is None or len(chunks.starts) - 1 <= chunks.window:
        return shuffled
    # Chunks without any of `indices` take no part.
    chunk_ids, chunk_rank = np.unique(
        np.searchsorted(chunks.starts, shuffled, side="right") - 1, return_inverse=True
    )
    chunk_order = torch.randperm(len(chunk_ids), generator=gen).numpy()
    return shuffled[np.argsort(chunk_order[chunk_rank] // chunks.window, kind="stable")]
