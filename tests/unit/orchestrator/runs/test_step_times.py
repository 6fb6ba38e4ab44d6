"""Seconds of a micro-batch: probed, remembered, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.step_probe import Probe, StepTimes
from bim.orchestrator.runs.step_times import (
    RAY_CPU_S,
    SHARED_CPU_S,
    SHARED_FACTOR,
    STEP_TIMES,
    known_times,
    micro_batch_seconds,
    probe_steps,
    read_times,
    save_times,
    training_seconds,
)
from bim.orchestrator.training.errors import StageFailure, TrainingError

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


def test_a_micro_batch_that_takes_too_long_is_probed_in_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bim.orchestrator.runs.step_times.PROBE_S", 1e-4)
    settings = load_settings(TINY)
    run, source, splits = resolve_run(settings, tmp_path)
    times = probe_steps(Probe.of(run, layout(4), "fp32"), (source, splits))
    assert times.scale == 32.0  # two images for 64
    assert len(times.stages) == 4


def probe_of(tmp_path: Path, *argv: str) -> Probe:
    return Probe.of(resolve_run(load_settings([*TINY, *argv]), tmp_path)[0], layout(4), "fp32")


@pytest.mark.parametrize(
    ("cause", "error"), [(DataError("no image can be read"), DataError), (ValueError("bad"), TrainingError)]
)
def test_a_step_that_fails_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, error: type[Exception]
) -> None:
    def fail(*_: object) -> StepTimes:
        raise StageFailure("the data loader", "at step 0", cause, process_lost=False)

    monkeypatch.setattr("bim.orchestrator.runs.step_times._timed", fail)
    run, source, splits = resolve_run(load_settings(TINY), tmp_path)
    with pytest.raises(error, match=str(cause)):
        probe_steps(Probe.of(run, layout(4), "fp32"), (source, splits))


def test_what_a_probe_depends_on(tmp_path: Path) -> None:
    probe = probe_of(tmp_path)
    for same in (
        "--schedule.epochs 20",
        "--optim.blr 1",
        "--seed 3",
        "--data.workers 1",
        "--data.accumulate 2",
    ):
        assert probe_of(tmp_path, *same.split()).key == probe.key
    for other in ("--data.batch_size 8", "--mask.ratio 0.5", "--decoder.depth 2", "--data.flip true"):
        assert probe_of(tmp_path, *other.split()).key != probe.key


def test_the_times_of_a_run_are_read_for_another_one_with_its_settings(tmp_path: Path) -> None:
    probe, times = probe_of(tmp_path, "--data.batch_size", "6"), StepTimes((0.25, 0.5), 0.125, 2.0)
    save_times(tmp_path, probe, times)
    assert known_times(probe) is None
    read_times(tmp_path)
    assert known_times(probe) == times
    assert known_times(probe_of(tmp_path, "--data.batch_size", "7")) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"stages": 1, "loading": 1, "scale": 1, "probe": 1}']
)
def test_times_that_cannot_be_read_tell_nothing(tmp_path: Path, text: str) -> None:
    read_times(tmp_path)
    (tmp_path / STEP_TIMES).write_text(text)
    read_times(tmp_path)
