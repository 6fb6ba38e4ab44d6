"""The whole job with every part of FastMIM at once, in one process: a pyramid, painted images, HOG, a growing resolution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.jobs.job import run_job
from bim.orchestrator.jobs.prepare import prepare

pytestmark = pytest.mark.slow

ARGUMENTS = """
--backbone.name convnext_atto --backbone.model_args {img_size: 96, depths: [1,1,2,1], dims: [8,16,24,32]}
--mask.ratio 0.5 --target.name hog --target.cell [4,8,16,32] --decoder.dim 32
--schedule.epochs 2 --schedule.warmup_epochs 0 --schedule.resolution [[0,64],[1,96,32,2]]
--data.batch_size 64 --data.val_fraction 0.1 --data.test_fraction 0.8
--placement.backend in_process --placement.threads_per_stage 1 --evaluation.latency false --search.trials 0
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("dense")
    argv = [part.strip() for line in ARGUMENTS.split("--") if line.strip() for part in line.split(None, 1)]
    argv = [f"--{part}" if number % 2 == 0 else part for number, part in enumerate(argv)]
    store = f"sqlite:///{folder}/mlflow.db"
    settings = load_settings([*argv, "--out", str(folder / "run"), "--tracking.uri", store])
    result = run_job(prepare(settings))
    events = (result.out / "events.log").read_text().splitlines()
    assert result.stopped is None, events  # a signal from outside stops the job, not the test session
    return result.out, [*(line[21:] for line in events), result.table]  # without the times


def test_a_pyramid_is_trained_through_growing_images_to_its_end(finished: tuple[Path, list[str]]) -> None:
    _, lines = finished
    assert "64 x 64 -> 96 x 96 px, hog of 4 px, hog of 8 px, hog of 16 px, hog of 32 px" in lines[0]
    assert any(line.startswith("epoch 2/2") for line in lines)
    assert "depth" in lines[-1]


def test_every_level_comes_out_as_a_folder_that_timm_opens_at_two_sizes(
    finished: tuple[Path, list[str]],
) -> None:
    out, _ = finished
    for depth, stride in ((1, 4), (2, 8), (4, 16), (5, 32)):
        folder = out / "variants" / f"depth{depth:02d}"
        assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 96, 96]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        for size in (96, 128):
            with torch.inference_mode():
                output = model(torch.zeros(1, 3, size, size))
            maps = (
                output[0]
                if isinstance(output, list)
                else model.forward_features(torch.zeros(1, 3, size, size))
            )
            assert maps.shape[-2:] == (size // stride, size // stride)


def test_pictures_show_the_histograms(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    assert len(list((out / "pictures").glob("reconstruction_depth*.png"))) == 4
