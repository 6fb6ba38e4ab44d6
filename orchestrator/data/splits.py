"""Three disjoint splits of a source from a seed: train for pretraining, val for model selection, test for reporting.
Splits that the data defines take precedence; a missing one is cut from its train split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from bim.models.seeding import generator
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.source import Source

MIN_UNKNOWN_FRACTION = 0.1
"""Fraction of test images, of classes that no training image has, from which on there is a note."""


@dataclass(frozen=True)
class Splits:
    """Image numbers of each split: sorted int64, disjoint, together all images that are used.

    notes: what is not used, and scores that cannot tell anything; a sentence each.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()


def labeled(source: Source, indices: np.ndarray) -> np.ndarray:
    """Those of the images that have a label: (n,) image numbers -> (m,), in their order."""
    return indices[:0] if source.labels is None else indices[source.labels[indices] >= 0]


def can_score(source: Source, splits: Splits) -> bool:
    """Whether accuracies can be measured: some images of the train split and of the test split have labels."""
    return len(labeled(source, splits.train)) > 0 and len(labeled(source, splits.test)) > 0


def unlabeled_splits(source: Source) -> dict[str, int]:
    """Name -> images of the fixed splits val and test that are not used: without labels, where training images have some."""
    fixed = source.fixed_splits or {}
    if not len(labeled(source, fixed.get("train", np.arange(0)))):
        return {}
    return {
        name: len(fixed[name])
        for name in ("val", "test")
        if len(fixed.get(name, ())) and not len(labeled(source, fixed[name]))
    }


def make_splits(source: Source, seed: int, val_fraction: float, test_fraction: float) -> Splits:
    """Split `source`. The fractions are of all images, or of the fixed train split where a split is cut from it.

    Labeled data is stratified by class. A fraction of 0 leaves a split empty; labeled data needs a test split, since
    the scores come from it. A fixed split without labels beside a train split that has some counts as missing.
    Raises DataError if a split with a positive fraction, or the train split, would be empty.
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
    pool, notes = parts["train"], list[str]()
    is_labeled = len(labeled(source, pool)) > 0
    for name, count in unlabeled_splits(source).items():
        del parts[name]
        fraction = val_fraction if name == "val" else test_fraction
        instead = (
            f"{fraction:g} of the training images take their place"
            if fraction
            else "nothing takes their place"
        )
        notes.append(f"the {count} images of the {name} split have no labels and are not used; {instead}")
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
    if is_labeled and len(parts["test"]) == 0:
        raise DataError(
            f"{source.name} has labels, but data.test_fraction=0 leaves no image to score the backbones on; "
            "set it above 0 (0.2, say)"
        )
    splits = Splits(parts["train"], parts["val"], parts["test"])
    return replace(splits, notes=(*notes, *_score_notes(source, splits)))


def _score_notes(source: Source, splits: Splits) -> list[str]:
    """Notes on accuracies that cannot be measured, or cannot be anything but 0 or 100 %."""
    if source.labels is None:
        return []
    if not can_score(source, splits):
        where = "training" if not len(labeled(source, splits.train)) else "test"
        return [f"no {where} image of {source.name} has a label, so no accuracy is measured"]
    train = np.unique(source.labels[labeled(source, splits.train)])
    test_labels = source.labels[labeled(source, splits.test)]
    unknown = ~np.isin(test_labels, train)
    if unknown.mean() >= MIN_UNKNOWN_FRACTION:
        classes = np.unique(test_labels[unknown])
        names = [
            str(c) if source.class_names is None else source.class_names[c] for c in classes[:3].tolist()
        ]
        listed = ", ".join(names) + ", ..." * (len(classes) > 3)
        some = f"at most {100 * (1 - unknown.mean()):.0f} %" if not unknown.all() else "nothing but 0 %"
        return [
            f"{int(unknown.sum())} of {len(test_labels)} test images are of classes that no training image has ({listed}), "
            f"so accuracies can be {some}"
        ]
    if len(train) == 1:
        return ["all training images with a label are of one class, so accuracies tell nothing"]
    return []


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
