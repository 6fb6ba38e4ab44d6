"""What keeps a finished checkpoint from being measured is a failure with a sentence, not wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from bim.models.backbones import open_backbone
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataError, ImageDecodeError, TooManyCorruptImagesError
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.metrics import UnscorableError
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.jobs import evaluate_checkpoint as module
from bim.orchestrator.jobs.evaluate_checkpoint import decoding_workers, evaluate_checkpoint
from bim.orchestrator.jobs.evaluation_task import EvaluationTask
from bim.orchestrator.jobs.reconstructions import save_all_reconstructions
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.spec import PretrainSpec


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("the images of photos have changed"), "photos have changed; --resume evaluates"),
        (TooManyCorruptImagesError("3 of 9 images"), "3 of 9 images; --resume evaluates"),
        (
            UnscorableError("embeddings are not finite"),
            "embeddings are not finite; the last checkpoint stays",
        ),
    ],
)
def test_what_keeps_a_checkpoint_from_being_measured_is_a_failure_of_the_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def refuse(task: EvaluationTask) -> None:
        raise error

    monkeypatch.setattr(module, "_evaluate", refuse)
    with pytest.raises(TrainingError, match=told):
        evaluate_checkpoint(cast(EvaluationTask, None))


def test_unreadable_images_of_the_reconstructions_are_named(tmp_path: Path) -> None:
    class Damaged(DigitsSource):
        def load(self, index: int) -> Tensor:
            raise ImageDecodeError(self.sample_id(index), "made so")

    backbone = open_backbone("vit_tiny_patch16_224", 1, {"img_size": 16, "patch_size": 4, "depth": 1})
    splits = Splits(np.arange(3), np.arange(0), np.array([7, 8]))
    bad: dict[str, str] = {}
    source: Any = Damaged()
    spec, cpu = cast(PretrainSpec, None), torch.device("cpu")
    inputs = EvalInputs(source, splits, (16, 16), (0.5,) * 3, (0.5,) * 3, cpu, EvalConfig())
    pictures = save_all_reconstructions(spec, backbone, [], inputs, tmp_path, bad)
    assert pictures == {}
    assert bad == {"digit 7": "made so", "digit 8": "made so"}


@pytest.mark.parametrize(
    ("device", "threads", "workers"), [("cuda", None, 6), ("cpu", 4, 4), ("cpu", 8, 6), ("cpu", 1, 0)]
)
def test_images_are_decoded_by_the_workers_of_the_training_that_have_a_cpu(
    device: str, threads: int | None, workers: int
) -> None:
    assert decoding_workers(6, device, threads) == workers
