from __future__ import annotations

import numpy as np
import pytest
import torch

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.splits import can_score, make_splits


class Numbers:
    """A source of n images of which only the labels matter."""

    name = "numbers"
    class_names = None
    chunks = None
    notes = ()

    def __init__(
        self, n: int, labels: np.ndarray | None = None, fixed: dict[str, np.ndarray] | None = None
    ) -> None:
        self.n, self.labels, self.fixed_splits = n, labels, fixed

    def __len__(self) -> int:
        return self.n

    def load(self, index: int) -> torch.Tensor:
        raise NotImplementedError

    def sample_id(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize("labeled", [False, True])
def test_splits_are_sorted_disjoint_and_cover_all(labeled: bool):
    labels = np.arange(203) % 7 if labeled else None
    splits = make_splits(Numbers(203, labels), 0, 0.1, 0.2)
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [142, 20, 41]
    assert np.array_equal(np.sort(np.concatenate([splits.train, splits.val, splits.test])), np.arange(203))
    for part in (splits.train, splits.val, splits.test):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def test_splits_depend_on_the_seed_and_on_nothing_else():
    first, again, other = (make_splits(Numbers(100), seed, 0.1, 0.2) for seed in (0, 0, 1))
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_every_class_gives_its_share():
    labels = np.repeat([0, 1, 2], [500, 100, 20])
    splits = make_splits(Numbers(620, labels), 3, 0.1, 0.2)
    for part, share in ((splits.val, 0.1), (splits.test, 0.2)):
        for label, count in enumerate((500, 100, 20)):
            assert abs((labels[part] == label).sum() - share * count) <= 1.5


def test_fixed_splits_win_over_the_fractions():
    fixed = {"train": np.arange(60, 100), "val": np.arange(0, 40), "test": np.arange(40, 60)}
    splits = make_splits(Numbers(100, fixed=fixed), 0, 0.5, 0.4)
    assert np.array_equal(splits.train, fixed["train"])
    assert np.array_equal(splits.val, fixed["val"])
    assert np.array_equal(splits.test, fixed["test"])


def test_a_missing_fixed_split_is_cut_from_train():
    fixed = {"train": np.arange(40, 100), "val": np.arange(40)}
    splits = make_splits(Numbers(100, fixed=fixed), 0, 0.1, 0.2)
    assert np.array_equal(splits.val, fixed["val"])
    assert len(splits.test) == 12
    assert np.array_equal(np.union1d(splits.train, splits.test), fixed["train"])


def test_an_empty_fixed_split_counts_as_missing():
    fixed = {"train": np.arange(100), "test": np.arange(0)}
    assert len(make_splits(Numbers(100, np.arange(100) % 2, fixed), 0, 0.1, 0.2).test) == 20
    with pytest.raises(DataError, match="no images in its train split"):
        make_splits(Numbers(3, fixed={"train": np.arange(0), "test": np.arange(3)}), 0, 0.1, 0.2)


def test_a_share_of_no_image_is_refused():
    with pytest.raises(
        DataError, match=r"8 images to split.*data\.val_fraction=0\.05 of them is none; raise it"
    ):
        make_splits(Numbers(8), 0, 0.05, 0.2)


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(DataError, match="leave none to train on"):
        make_splits(Numbers(10), 0, 0.5, 0.5)


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(DataError, match=r"data\.test_fraction is 1\.5"):
        make_splits(Numbers(10), 0, 0.1, 1.5)


def test_no_test_images_are_refused_only_where_labels_could_be_scored():
    assert len(make_splits(Numbers(10), 0, 0.1, 0).test) == 0
    with pytest.raises(DataError, match=r"data\.test_fraction=0 leaves no image to score"):
        make_splits(Numbers(10, np.arange(10) % 2), 0, 0.1, 0)


def test_a_fixed_split_without_labels_counts_as_missing_and_is_told():
    labels = np.arange(100) % 2
    labels[80:] = -1
    fixed = {"train": np.arange(80), "test": np.arange(80, 100)}
    splits = make_splits(Numbers(100, labels, fixed), 0, 0.1, 0.2)
    assert len(splits.test) == 16
    assert max(splits.test) < 80
    assert splits.notes == (
        "the 20 images of the test split have no labels and are not used; 0.2 of the training images take their place",
    )


def test_rows_without_a_label_stay_in_every_split():
    labels = np.arange(100) % 2
    labels[::4] = -1
    splits = make_splits(Numbers(100, labels), 0, 0.1, 0.2)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 100
    assert (labels[splits.test] < 0).sum() == 5
    assert splits.notes == ()


@pytest.mark.parametrize(
    ("test_labels", "note"),
    [
        ([7] * 10, ("10 of 10", "nothing but 0 %")),
        ([7] * 4 + [1] * 6, ("4 of 10", "at most 60 %")),
        ([0, 1] * 5, None),
    ],
)  # fmt: skip
def test_accuracies_that_cannot_be_reached_are_told(test_labels: list[int], note: tuple[str, str] | None):
    labels = np.array([0, 1] * 20 + test_labels)
    splits = make_splits(
        Numbers(50, labels, {"train": np.arange(40), "test": np.arange(40, 50)}), 0, 0.1, 0.2
    )
    sentence = "{} test images are of classes that no training image has (7), so accuracies can be {}"
    assert splits.notes == (() if note is None else (sentence.format(*note),))


def test_labels_of_the_test_split_alone_measure_nothing_and_that_is_told():
    labels = np.array([-1] * 40 + [0, 1] * 5)
    source = Numbers(50, labels, {"train": np.arange(40), "test": np.arange(40, 50)})
    splits = make_splits(source, 0, 0.1, 0.2)
    assert not can_score(source, splits)
    assert splits.notes == ("no training image of numbers has a label, so no accuracy is measured",)
