from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bim.orchestrator.data.dataset_source import labels_of
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.torchvision_source import TorchvisionSource


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """MNIST's four files with three training images and two test images: image k is filled with 10 * k."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, numbers in (("train", [0, 1, 2]), ("t10k", [3, 4])):
        images = b"".join(bytes([10 * n]) * 28 * 28 for n in numbers)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, len(numbers), 28, 28) + images
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, len(numbers)) + bytes(numbers)
        )
    return tmp_path


def test_training_and_test_part_are_fixed_splits(mnist: Path):
    source = TorchvisionSource.parse(f"MNIST:{mnist}")
    assert len(source) == 5
    assert source.fixed_splits is not None
    assert {k: v.tolist() for k, v in source.fixed_splits.items()} == {"train": [0, 1, 2], "test": [3, 4]}
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.class_names is not None
    assert len(source.class_names) == 10
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.load(4), torch.full((3, 28, 28), 40, dtype=torch.uint8))
    assert len(pickle.dumps(source)) < 2_000
    assert np.unique([source.fingerprint(), copy.fingerprint()]).size == 1


def test_unknown_name_and_missing_data_are_refused(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"data set 'CIFAR11' does not exist; .*did you mean 'torchvision:CIFAR10'"
    ):
        TorchvisionSource.parse(f"CIFAR11:{tmp_path}")
    with pytest.raises(DataError, match=r"CIFAR10 cannot be opened below .*download it there first"):
        TorchvisionSource.parse(f"CIFAR10:{tmp_path}")


@pytest.mark.parametrize(
    "name",
    ["FakeData", "LSUN", "VisionDataset", "wrap_dataset_for_transforms_v2", "CocoDetection", "", "__all__"],
)
def test_names_that_are_no_images_of_classes_are_refused_before_anything_is_opened(name: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"torchvision's data set '.*' (is no set of images|does not exist)"):
        TorchvisionSource.parse(f"{name}:{tmp_path}")


class Part:
    """Stands for a data set that keeps its labels under one name."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"targets": [1, 0]}, [1, 0]),
        ({"_labels": [1, 0]}, [1, 0]),
        ({"y": [1, -1]}, [1, -1]),
        ({"_samples": [("a.png", 1), ("b.png", 0)]}, [1, 0]),
        ({"targets": [[1], [0, 1]]}, None),
        ({"targets": [0.5, 1.5]}, None),
        ({}, None),
    ],
)
def test_labels_are_found_where_data_sets_keep_them(
    attributes: dict[str, object], expected: list[int] | None
):
    labels = labels_of(Part(**attributes))
    assert (None if labels is None else labels.tolist()) == expected
