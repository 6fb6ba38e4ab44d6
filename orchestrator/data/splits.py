"""Three disjoint splits of a source from a seed: train for pretraining, val for model selection, test for reporting.
Splits that the data defines take precedence; a missing one is cut from its train split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bim.models.seeding import generator
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.source import Source


@dataclass(frozen=True)
class Splits:
    """Image numbers of each split: sorted int64, disjoint, together all images of the source."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_splits(source: Source, seed: int, val_fraction: float, test_fraction: float) -> Splits:
    """Split `source`. The fractions are of all images, or of the fixed train split where a split is cut from it.

    Labeled data is stratified by class. A fraction of 0 leaves a split empty; labeled data needs a test split, since
    the scores come from it. Raises DataError if a split with a positive fraction, or the train split, would be empty.
    """
    for key, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise DataError(
                f"data.{key} is {fraction}; give a fraction of the images, at least 0 and below 1"
            )
    fixed = source.fixed_splits or {"train": np.arange(len(source), dtype=np.int64)}
    parts = {name: np.sort(indices) for name, indices in fixed.items() if len(indices)}
    if "train" not in parts:
        raise DataError(
            f"{source.name} has no images in its train split; set data.source to data that has some"
        )
    pool = parts["train"]
    cut_sizes: dict[str, int] = {}
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        if name in parts:
            continue
        cut_sizes[name] = round(len(pool) * fraction)
        if fraction > 0 and cut_sizes[name] == 0:
            raise DataError(
                f"{source.name} has {len(pool)} images to split, and data.{name}_fraction={fraction} of them is none; "
                f"raise it above {1 / len(pool):.3f}"
            )
    if sum(cut_sizes.values()) >= len(pool):
        raise DataError(
            f"{source.name} has {len(pool)} images to split, and data.val_fraction={val_fraction} with "
            f"data.test_fraction={test_fraction} leave none to train on; lower them"
        )
    permutation = _stratified_permutation(pool, source.labels, seed)
    for name, count in cut_sizes.items():
        parts[name], permutation = np.sort(permutation[:count]), permutation[count:]
    parts["train"] = np.sort(permutation)
    if source.labels is not None and len(parts["test"]) == 0:
        raise DataError(
            f"{source.name} has labels, but data.test_fraction=0 leaves no image to score the backbones on; "
            "set it above 0 (0.2, say)"
        )
    return Splits(parts["train"], parts["val"], parts["test"])


def _stratified_permutation(pool: np.ndarray, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """`pool` shuffled so that any run of it holds the classes in about their proportions.

    The j-th of a class's n images is sorted by (j + u) / n, u one random number per class: a run of m images holds m
    times the class's proportion, give or take one.
    """
    shuffled = pool[torch.randperm(len(pool), generator=generator(seed, "split")).numpy()]
    if labels is None:
        return shuffled
    _, class_of, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    rank_in_class = np.empty(len(shuffled))
    rank_in_class[np.argsort(class_of, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    offset = torch.rand(len(counts), generator=generator(seed, "split-offset"), dtype=torch.float64).numpy()
    sort_key = (rank_in_class + offset[class_of]) / counts[class_of]
    return shuffled[np.argsort(sort_key, kind="stable")]
