from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataError, ImageDecodeError, TooManyCorruptImagesError
from bim.orchestrator.data.loader import eval_images
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.batch_norms import gather_statistics
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.records import EvalConfig

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def gather(model: nn.Module, images: np.ndarray, batch_size: int = 50) -> None:
    splits, config = Splits(images, images[:0], images[:0]), EvalConfig(batch_size=batch_size)
    inputs = EvalInputs(DigitsSource(), splits, (8, 8), MEAN, STD, torch.device("cpu"), config)
    gather_statistics({1: model}, inputs)


def test_statistics_become_those_of_whole_images_and_no_weight_changes() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.running_mean.fill_(9.0)
    before = {name: value.clone() for name, value in norm.named_parameters()}
    gather(nn.Sequential(norm), np.arange(100))
    pixels = np.concatenate([images for _, images in eval_images(DigitsSource(), np.arange(100), (8, 8), 50)])
    x = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.25
    assert torch.allclose(norm.running_mean, x.mean(dim=(0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.running_var, x.var(dim=(0, 2, 3)), rtol=0.02)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_parameters())
    assert not norm.training
    assert norm.momentum == 0.3


def test_a_model_without_batch_norms_is_left_alone() -> None:
    class Refusing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it has nothing to gather")

    gather(Refusing(), np.arange(10))


def test_unreadable_images_are_counted_named_and_limited() -> None:
    class Damaged(DigitsSource):
        def load(self, index: int) -> torch.Tensor:
            if index % 10 == 0:
                raise ImageDecodeError(self.sample_id(index), "made so")
            return super().load(index)

    def measure(images: np.ndarray, **options: float) -> dict[str, str]:
        model, config = nn.Sequential(nn.BatchNorm2d(3)), EvalConfig(**{"max_bad_fraction": 1.0} | options)
        splits = Splits(images, images[:0], images[:0])
        inputs = EvalInputs(Damaged(), splits, (8, 8), MEAN, STD, torch.device("cpu"), config)
        return gather_statistics({1: model}, inputs)

    assert measure(np.arange(30)) == dict.fromkeys(("digit 0", "digit 10", "digit 20"), "made so")
    with pytest.raises(TooManyCorruptImagesError, match="2 of 30 images could not be read"):
        measure(np.arange(30), max_bad_fraction=0.01)
    with pytest.raises(DataError, match="no training image of digits could be read"):
        measure(np.arange(0, 30, 10))


def test_several_models_get_their_own_statistics_from_images_that_are_decoded_once() -> None:
    class Counting(DigitsSource):
        loads = 0

        def load(self, index: int) -> torch.Tensor:
            Counting.loads += 1
            return super().load(index)

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def gathered(*seeds: int) -> list[dict[str, torch.Tensor]]:
        models = {("set", seed): model(seed) for seed in seeds}
        images = np.arange(100)
        splits, config = Splits(images, images[:0], images[:0]), EvalConfig(batch_size=30)
        gather_statistics(
            models, EvalInputs(Counting(), splits, (8, 8), MEAN, STD, torch.device("cpu"), config)
        )
        return [one.state_dict() for one in models.values()]

    together = gathered(1, 2)
    assert Counting.loads == 100
    for ours, alone in zip(together, [*gathered(1), *gathered(2)], strict=True):
        assert all(torch.equal(value, alone[name]) for name, value in ours.items())
