"""What a data set is, as far as automatic settings and an estimate depend on it: how many images, how large, labeled."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import numpy as np

from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import labeled, unlabeled_splits

SAMPLED_IMAGES = 48

MIN_IMAGES = 20
"""Of fewer, no split leaves anything to learn from."""


@dataclass(frozen=True)
class ImageFacts:
    """Counts and sizes of a source.

    Args:
        source: as the user names it.
        splits: images of each split that the data brings along and `make_splits` takes; `{"train": n}` if it brings none.
        short_side_px: median of the shorter sides of some images.
        is_labeled: whether training images have labels.
        unlabeled_splits: images of the splits that are left out, because they have no labels and training images have.
    """

    source: str
    splits: dict[str, int]
    short_side_px: int
    is_labeled: bool
    unlabeled_splits: dict[str, int] = field(default_factory=dict)


def image_facts(source: Source, sampled: int = SAMPLED_IMAGES) -> ImageFacts:
    """Count, and decode some images that are spread evenly over the source.

    Raises:
        DataError: none of these images can be read, or there are fewer than `MIN_IMAGES`.
    """
    fixed = source.fixed_splits or {"train": np.arange(len(source), dtype=np.int64)}
    pool = fixed.get("train", np.arange(0))
    if len(pool) < MIN_IMAGES:
        raise DataError(
            f"{source.name} has {len(pool)} images to split and train on, too few to choose settings for (at least "
            f"{MIN_IMAGES}); give more images, or settings of your own with --recipe"
        )
    indices = pool[np.linspace(0, len(pool) - 1, min(sampled, len(pool))).round().astype(np.int64)]
    sides, reasons = [], []
    for index in indices.tolist():
        try:
            image = source.load(index)
        except ImageDecodeError as error:
            reasons.append(str(error))
            continue
        sides.append(min(image.shape[1:]))
    if not sides:
        raise DataError(
            f"none of {len(indices)} images of the train split of {source.name} can be read; the first: {reasons[0]}"
        )
    unlabeled = unlabeled_splits(source)
    return ImageFacts(
        source.name,
        {name: len(members) for name, members in fixed.items() if len(members) and name not in unlabeled},
        int(statistics.median_low(sides)),
        len(labeled(source, pool)) > 0,
        unlabeled,
    )
