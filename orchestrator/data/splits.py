"""Three disjoint parts of a source from a stated seed: train for pretraining, val for choosing, test for reporting.
Splits that the data brings along win; a missing one is cut from its train part. Knows no pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bim.models.seeding import generator
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.source import Source


@dataclass(frozen=True)
class Splits:
    """Image numbers of each part: sorted int64, disjoint, together all images of the source."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_splits(source: Source, seed: int, val_fraction: float, test_fraction: float) -> Splits:
    """Split `source`. The fractions are of all images, or of the fixed train part where they are cut from that.

    With labels every class gives its share, so far as whole images allow. A fraction of 0 leaves the part empty; an empty
    test part is refused where labels exist, since nothing could be scored. Raises DataError if a part that was asked
    for would come out empty, or nothing would be left to train on.
    """
    for key, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise DataError(f"data.{key} is {fraction}; give a share of the images, at least 0 and below 1")
    fixed = source.fixed_splits or {"train": np.arange(len(source), dtype=np.int64)}
    parts = {name: np.sort(indices) for name, indices in fixed.items() if len(indices)}
    if "train" not in parts:
        raise DataError(
            f"{source.name} has no images in its train split; set data.source to data that has some"
        )
    pool = parts["train"]
    carved: dict[str, int] = {}
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        if name in parts:
            continue
        carved[name] = round(len(pool) * fraction)
        if fraction > 0 and carved[name] == 0:
            raise DataError(
                f"{source.name} has {len(pool)} images to split, and data.{name}_fraction={fraction} of them is none; "
                f"raise it above {1 / len(pool):.3f}"
            )
    if sum(carved.values()) >= len(pool):
        raise DataError(
            f"{source.name} has {len(pool)} images to split, and data.val_fraction={val_fraction} with "
            f"data.test_fraction={test_fraction} leave none to train on; lower them"
        )
    order = _stratified_order(pool, source.labels, seed)
    for name, count in carved.items():
        parts[name], order = np.sort(order[:count]), order[count:]
    parts["train"] = np.sort(order)
    if source.labels is not None and len(parts["test"]) == 0:
        raise DataError(
            f"{source.name} has labels, but data.test_fraction=0 leaves no image to score the backbones on; "
            "set it above 0 (0.2, say)"
        )
    return Splits(parts["train"], parts["val"], parts["test"])


def _stratified_order(pool: np.ndarray, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """`pool` shuffled so that any run of it holds the classes in about their shares.

    The j-th of a class's n images stands at (j + u) / n, u one random number per class: cutting a run of m images then
    takes m times the class's share of it, give or take one.
    """
    shuffled = pool[torch.randperm(len(pool), generator=generator(seed, "split")).numpy()]
    if labels is None:
        return shuffled
    _, class_of, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    within = np.empty(len(shuffled))  # how many of the class came before
    within[np.argsort(class_of, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    offset = torch.rand(len(counts), generator=generator(seed, "split-offset"), dtype=torch.float64).numpy()
    place = (within + offset[class_of]) / counts[class_of]
    return shuffled[np.argsort(place, kind="stable")]
