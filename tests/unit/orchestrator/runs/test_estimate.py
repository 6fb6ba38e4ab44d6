"""Times and sizes of a run before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import ClusterResources, StageLayout
from bim.orchestrator.reporting.estimate import byte_text, estimate_lines
from bim.orchestrator.runs.estimate import (
    RAY_CPU_S,
    SHARED_CPU_S,
    SHARED_FACTOR,
    StepTimes,
    estimate_run,
    micro_batch_seconds,
    probe_steps,
    separate_ratio,
    training_seconds,
)
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.train import resolve_layout

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
TINY = [
    *("--backbone.model_args", json.dumps(ARGS), "--decoder.dim", "32", "--decoder.num_heads", "1"),
    *("--data.workers", "0", "--schedule.epochs", "10", "--schedule.warmup_epochs", "1"),
]


def layout(stages: int, gpus: float = 0.0, threads: int = 1) -> StageLayout:
    return StageLayout(tuple((k,) for k in range(stages)), gpus, 1.0, 1.0, threads)


def test_stages_on_gpus_work_at_the_same_time_and_those_on_cpus_share_them() -> None:
    times = StepTimes((0.1, 0.2, 0.1), loading=0.3)
    assert micro_batch_seconds(times, layout(3), "in_process", 2, workers=0) == pytest.approx(0.7)
    assert micro_batch_seconds(times, layout(3, gpus=1), "ray", 8, workers=4) == pytest.approx(
        0.2 + RAY_CPU_S
    )
    assert micro_batch_seconds(times, layout(3, gpus=1), "ray", 8, workers=1) == pytest.approx(
        0.3 + RAY_CPU_S
    )
    assert micro_batch_seconds(times, layout(3), "ray", 2, workers=0) == pytest.approx(
        (SHARED_FACTOR * 0.7 + 4 * SHARED_CPU_S) / 2
    )
    assert micro_batch_seconds(times, layout(3), "ray", 64, workers=0) == pytest.approx(0.3 + RAY_CPU_S)


def test_phases_of_smaller_images_count_by_their_pixels(tmp_path: Path) -> None:
    growing = ["--schedule.resolution", "[[0, 8], [5, 16]]"]
    whole, _, _ = resolve_run(load_settings(TINY), tmp_path)
    run, _, _ = resolve_run(load_settings([*TINY, *growing]), tmp_path)
    assert training_seconds(whole, 1.0) == whole.total_steps
    assert training_seconds(run, 1.0) == pytest.approx(run.total_steps * (0.5 + 0.5 / 4))


def test_separate_runs_train_early_blocks_again_and_again() -> None:
    assert separate_ratio([(1.0, 0.0)] * 4) == pytest.approx(10 / 4)
    assert separate_ratio([(1.0, 1.0)]) == 1.0


@pytest.mark.parametrize("is_probed", [True, False])
def test_an_estimate_of_a_run_and_its_lines(tmp_path: Path, is_probed: bool) -> None:
    settings = load_settings([*TINY, "--placement.backend", "in_process"])
    run, source, splits = resolve_run(settings, tmp_path / "run")
    stages = resolve_layout(settings, ClusterResources(2, 0))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    estimate = estimate_run(run, (source, splits), stages, "fp32", 2, is_probed)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "run").exists()
    assert estimate.is_measured == is_probed
    assert estimate.images_per_s > 1
    assert estimate.training_s == pytest.approx(10 * estimate.epoch_s)
    assert estimate.stage_bytes(0) > sum(block.memory.parameters for block in estimate.blocks)
    assert [block.layers for block in estimate.blocks] == [1, 1, 1, 1]
    text = "\n".join(estimate_lines(estimate, gpus=4, price_per_gpu_hour=2.0))
    assert "4 separate MAE runs" in text
    assert "GPU hours" in text
    assert " at 2 an hour" in text
    assert ("(estimated)" in text) != is_probed
    assert max(map(len, text.splitlines())) <= 100


def test_a_micro_batch_that_takes_too_long_is_probed_in_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bim.orchestrator.runs.estimate.PROBE_S", 1e-4)
    settings = load_settings(TINY)
    run, source, splits = resolve_run(settings, tmp_path)
    times = probe_steps(run, (source, splits), layout(4), "fp32")
    assert times.scale == 32.0  # two images for 64
    assert len(times.stages) == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 kB"), (512_000, "512 kB"), (3_210_000, "3.21 MB"), (1.04e9, "1.04 GB"), (2e12, "2.00 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert byte_text(count) == text
