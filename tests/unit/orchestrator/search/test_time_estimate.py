"""The estimate of a search's time is arithmetic on two measured paces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.data.phases import PhaseSpec, phases_on
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.search.time_estimate import (
    MIN_START_S,
    Throughput,
    measure_throughput,
    start_seconds,
    trial_seconds,
)


def test_a_trial_takes_its_training_and_its_scores() -> None:
    phases = phases_on([PhaseSpec(0, (32, 32), 10)], 100)
    seconds = trial_seconds(
        Throughput(0.01, 0.001), phases, epochs=5, every_epochs=2, images=200, speedup=2.0
    )
    assert seconds == pytest.approx(5 * 100 * 0.01 / 2 + 3 * 200 * 0.001)


def test_smaller_images_take_less() -> None:
    phases = phases_on([PhaseSpec(0, (32, 32), 10), PhaseSpec(2, (64, 64), 10)], 100)
    seconds = trial_seconds(Throughput(0.01, 0.0), phases, epochs=4, every_epochs=4, images=0, speedup=1.0)
    assert seconds == pytest.approx(2 * 100 * 0.01 + 2 * 100 * 0.01 * 4)


def test_processes_start_at_the_pace_of_the_cores() -> None:
    assert start_seconds(3, 1.0) == 12.0
    assert start_seconds(3, 64.0) == MIN_START_S


def test_the_pace_is_measured_and_leaves_the_threads_as_they_were(tmp_path: Path) -> None:
    args = "{img_size: 16, patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2}"
    family, _, _ = resolve_run(load_settings(["--backbone.model_args", args]), tmp_path)
    before = torch.get_num_threads()
    found = measure_throughput(family.spec, family.data, "cpu", 1)
    assert torch.get_num_threads() == before
    assert 0 < found.score_s < found.train_s < 1
