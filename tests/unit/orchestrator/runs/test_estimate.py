"""Times and sizes of a run before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.reporting.estimate import byte_text, estimate_lines, summary_lines
from bim.orchestrator.runs.estimate import checkpoint_bytes, estimate_run, seconds_in_turns, separate_ratio
from bim.orchestrator.runs.estimate_records import BackboneEstimate
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.step_probe import Probe
from bim.orchestrator.runs.step_times import probe_steps
from bim.orchestrator.runs.train import resolve_layout
from bim.orchestrator.training.memory import BlockMemory

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
TINY = [
    *("--backbone.model_args", json.dumps(ARGS), "--decoder.dim", "32", "--decoder.num_heads", "1"),
    *("--data.workers", "0", "--schedule.epochs", "10", "--schedule.warmup_epochs", "1"),
]


def test_separate_runs_train_early_blocks_again_and_again() -> None:
    assert separate_ratio([(1.0, 0.0)] * 4) == pytest.approx(10 / 4)
    assert separate_ratio([(1.0, 1.0)]) == 1.0


@pytest.mark.parametrize("is_probed", [True, False])
def test_an_estimate_of_a_run_and_its_lines(tmp_path: Path, is_probed: bool) -> None:
    settings = load_settings([*TINY, "--placement.backend", "in_process"])
    run, source, splits = resolve_run(settings, tmp_path / "run")
    stages = resolve_layout(settings, ClusterResources(2, 0))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    times = probe_steps(Probe.of(run, stages, "fp32"), (source, splits)) if is_probed else None
    estimate = estimate_run(run, (source, splits), stages, "fp32", 2, times)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "run").exists()
    assert estimate.is_measured == is_probed
    assert estimate.images_per_s > 1
    assert estimate.training_s == pytest.approx(10 * estimate.epoch_s)
    assert estimate.stage_bytes(0) > sum(block.memory.parameters for block in estimate.blocks)
    assert [block.layers for block in estimate.blocks] == [1, 1, 1, 1]
    text = "\n".join(estimate_lines(BackboneEstimate(replace(estimate, gpus=4)), price_per_gpu_hour=2.0))
    assert "4 separate MAE runs" in text
    assert "GPU hours" in text
    assert " at 2 an hour" in text
    assert ("(estimated)" in text) != is_probed
    assert max(map(len, text.splitlines())) <= 100


def test_slow_models_and_short_runs_are_told_in_digits_that_say_something(tmp_path: Path) -> None:
    settings = load_settings([*TINY, "--placement.backend", "in_process"])
    run, source, splits = resolve_run(settings, tmp_path / "run")
    stages = resolve_layout(settings, ClusterResources(2, 0))
    estimate = estimate_run(run, (source, splits), stages, "fp32", 2, None)
    estimate = replace(estimate, images_per_s=0.4131, training_s=60.0, scores_s=0.0, evaluation_s=0.0, gpus=1)
    lines = summary_lines(BackboneEstimate(estimate), price_per_gpu_hour=None)
    assert lines[0].startswith("about 0.413 images/s (estimated): ")
    assert "GPU hours: 0.0167" in lines


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    block = BlockMemory(parameters=100, gradients=100, optimizer=200, activations=40)
    assert checkpoint_bytes([block, block], keep=2) == 3 * 600
    assert checkpoint_bytes([block, block], keep=2, keeps_best=True) == 4 * 600
    sizes = {}
    for every in ("0", "1"):
        argv = [*TINY, "--placement.backend", "in_process", "--evaluation.every_epochs", every]
        settings = load_settings([*argv, "--checkpoint.keep", "3"])
        run, source, splits = resolve_run(settings, tmp_path / "run")
        stages = resolve_layout(settings, ClusterResources(2, 0))
        sizes[every] = estimate_run(run, (source, splits), stages, "fp32", 2, None).checkpoint_bytes
    assert 4 * sizes["1"] == 5 * sizes["0"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 kB"), (512_000, "512 kB"), (3_210_000, "3.21 MB"), (1.04e9, "1.04 GB"), (2e12, "2.00 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert byte_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "concurrent", "until"), [([3, 2, 1], 1, 6), ([3, 2, 1], 2, 3), ([3, 2, 2], 2, 4), ([], 3, 0)]
)
def test_backbones_that_train_in_turns(seconds: list[float], concurrent: int, until: float) -> None:
    assert seconds_in_turns(seconds, concurrent) == until
