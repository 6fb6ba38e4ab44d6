"""What automatic settings know of images agrees with the splits that a run makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.facts import image_facts
from bim.orchestrator.data.splits import can_score, make_splits
from bim.orchestrator.jobs.automatic import nested
from bim.orchestrator.runs.auto_settings import StageResources, choose_settings


class Gray:
    """Images of 20 x 30 px, numbered train, val, test. labeled: the splits whose images have labels."""

    name = "gray"
    class_names = None
    chunks = None
    notes = ()

    def __init__(self, sizes: dict[str, int], labeled: set[str]) -> None:
        self.sizes = sizes
        starts = np.cumsum([0, *sizes.values()])
        self.fixed_splits = {
            split: np.arange(first, last)
            for split, first, last in zip(sizes, starts[:-1], starts[1:], strict=True)
        }
        self.labels = np.full(len(self), -1, dtype=np.int64)
        for split in labeled:
            self.labels[self.fixed_splits[split]] = self.fixed_splits[split] % 5
        if not labeled:
            self.labels = None

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def load(self, index: int) -> torch.Tensor:
        return torch.zeros(3, 20, 30, dtype=torch.uint8)

    def sample_id(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("labeled", "unlabeled_splits", "has_scores"),
    [
        ({"train", "val", "test"}, {}, True),
        ({"train", "val"}, {"test": 150}, True),
        ({"train"}, {"val": 60, "test": 150}, True),
        ({"test"}, {}, False),
        (set(), {}, False),
    ],
    ids=["all", "no labels in test", "labels in train alone", "labels in test alone", "none"],
)
def test_chosen_splits_are_those_that_a_run_makes(
    labeled: set[str], unlabeled_splits: dict[str, int], has_scores: bool
) -> None:
    source = Gray({"train": 1000, "val": 60, "test": 150}, labeled)
    facts = image_facts(source)
    assert facts.unlabeled_splits == unlabeled_splits
    assert facts.splits.keys() == {"train", "val", "test"} - unlabeled_splits.keys()
    chosen = choose_settings(facts, StageResources(2), {}, 1e9, lambda values: 1.0)
    data = settings_from_mapping(nested({"data.source": "gray", **chosen.values})).data
    splits = make_splits(source, data.split_seed, data.val_fraction, data.test_fraction)
    assert can_score(source, splits) == has_scores
    steps, images = len(splits.train) // data.batch_size, len(splits.train)
    assert f"batch {data.batch_size}: {steps} steps an epoch of {images} training images" in chosen.lines
    assert len(splits.test) == (200 if "test" in unlabeled_splits else 150)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="gray has 19 images to split and train on, too few"):
        image_facts(Gray({"train": 19, "test": 100}, {"train", "test"}))
