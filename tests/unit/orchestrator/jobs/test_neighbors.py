"""The picture of nearest neighbors: searched among the embeddings of an evaluation, with labels and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from torch import nn

from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import ImageDecodeError
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.evaluate import evaluate_sets
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.jobs import neighbors as module
from bim.orchestrator.jobs.neighbors import SIMILARITY_NOTE, NeighborPicture


class Digits(DigitsSource):
    """Scanned digits, some of which cannot be read."""

    def __init__(self, labeled: bool, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.bad = bad
        if not labeled:
            self.labels = None

    def load(self, index: int) -> torch.Tensor:
        if index in self.bad:
            raise ImageDecodeError(f"digit {index}", "damaged")
        return super().load(index)


def vit(depth: int) -> nn.Module:
    torch.manual_seed(depth)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 1}
    return timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=0, global_pool="avg", **sizes)


def drawn(
    monkeypatch: pytest.MonkeyPatch, folder: Path, source: DigitsSource, splits: Splits
) -> tuple[list[Figure], dict[str, str]]:
    figures, bad = list[Figure](), dict[str, str]()

    def write(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        assert path == folder / "nearest_neighbors.png"
        return path

    monkeypatch.setattr(module, "write_png", write)
    inputs = EvalInputs(source, splits, (16, 16), (0.5,) * 3, (0.5,) * 3, torch.device("cpu"), EvalConfig())
    variants = {1: vit(1), 2: vit(2), 3: vit(3)}
    picture = NeighborPicture(variants, inputs, bad)
    evaluate_sets(
        {"trained": variants}, inputs, on_train_features=lambda train: picture.search(train["trained"])
    )
    picture.save(folder, "digits_demo")
    return figures, bad


@pytest.mark.parametrize("labeled", [True, False])
def test_every_depth_has_its_neighbors_of_the_same_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, labeled: bool
) -> None:
    splits = Splits(np.arange(40), np.arange(0), np.arange(100, 140))
    (figure,), bad = drawn(monkeypatch, tmp_path, Digits(labeled, bad=(100,)), splits)
    texts = [text.get_text() for text in figure.texts]
    depths = [text for text in texts if text.startswith("nearest by")]
    assert depths == [f"nearest by depth {depth}" for depth in (1, 2, 3)]
    assert texts.count("image") == 2  # two depths abreast, the third below them
    whole = " ".join(texts)
    assert "digits_demo: 5 test images of digits, and the nearest of 40 training images" in whole
    assert SIMILARITY_NOTE in whole
    assert bad == {"digit 100": "damaged"}


def test_without_test_images_training_images_are_compared_with_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    splits = Splits(np.arange(6), np.arange(0), np.arange(0))
    (figure,), _ = drawn(monkeypatch, tmp_path, Digits(labeled=False), splits)
    assert "6 training images of digits, and the nearest of 6 training" in " ".join(
        text.get_text() for text in figure.texts
    )


def test_where_none_of_the_images_can_be_read_there_is_no_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    splits = Splits(np.arange(40), np.arange(0), np.arange(100, 103))
    figures, bad = drawn(monkeypatch, tmp_path, Digits(labeled=False, bad=(100, 101, 102)), splits)
    assert figures == []
    assert len(bad) == 3
