"""Nearest training images: by cosine, the nearest first, never the image itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bim.orchestrator.evaluation.features import SplitFeatures
from bim.orchestrator.evaluation.neighbors import Queries, nearest_images

ANGLES = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0])
TRAIN = SplitFeatures(
    {
        1: torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
        * torch.tensor([[9.0], [1.0], [5.0], [1.0], [2.0]]),
        2: -torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1),
    },
    np.array([10, 11, 12, 13, 14]),
)


def embedder(images: np.ndarray) -> Tensor:
    """The first value of an image as the angle of its embedding, in tenths."""
    angles = torch.from_numpy(images[:, 0, 0, 0].astype(np.float32)) / 10
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def queries(*angles: int, numbers: tuple[int, ...]) -> Queries:
    images = np.zeros((len(angles), 3, 2, 2), dtype=np.uint8)
    images[:, 0, 0, 0] = angles
    return Queries(np.array(numbers), images)


def test_neighbors_are_those_of_the_smallest_angle_whatever_their_length() -> None:
    nearest = nearest_images({1: embedder, 2: embedder}, TRAIN, queries(0, 6, numbers=(90, 91)), count=3)
    assert nearest[1].tolist() == [[10, 11, 12], [13, 12, 14]]
    assert nearest[2].tolist() == [[14, 13, 12], [10, 11, 14]]


def test_a_training_image_is_not_its_own_neighbor_and_fewer_images_give_fewer_neighbors() -> None:
    nearest = nearest_images({1: embedder}, TRAIN, queries(0, 6, numbers=(10, 91)), count=5)
    assert nearest[1].tolist() == [[11, 12, 13, 14], [13, 12, 14, 11]]


@pytest.mark.parametrize("numbers", [(10,)])
def test_without_another_training_image_there_are_none(numbers: tuple[int, ...]) -> None:
    only = SplitFeatures({1: TRAIN.by_depth[1][:1]}, np.array([10]))
    assert nearest_images({1: embedder}, only, queries(0, numbers=numbers)) == {}


def test_an_embedding_of_zeros_is_no_error() -> None:
    train = SplitFeatures({1: torch.zeros(3, 2)}, np.arange(3))
    assert nearest_images({1: embedder}, train, queries(0, numbers=(9,)), count=2)[1].shape == (1, 2)
