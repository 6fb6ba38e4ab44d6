"""The loop over hand-made stages: order of steps, window, phases, stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.phases import PhaseSpec, constant, phases_on
from bim.orchestrator.training.callbacks import EpochReport, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.messages import StepRequest
from tests.unit.orchestrator.training.stub_stages import CountingStages, Recorder, run, schedule


def test_every_step_is_submitted_once_in_order_and_the_end_is_saved(tmp_path: Path) -> None:
    stages, recorder = CountingStages(), Recorder()
    result = run(stages, tmp_path, recorder)
    assert [r.step for r in stages.requests] == list(range(15))
    assert result.step == 15
    assert result.stopped is None
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.step == 15
    assert [e.epoch for e in recorder.epochs] == [1, 2, 3]
    assert recorder.epochs[0].losses == pytest.approx({0: (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5, 1: 2.0})


def test_no_more_than_the_window_is_in_flight(tmp_path: Path) -> None:
    stages = CountingStages()
    run(stages, tmp_path, window=3)
    assert stages.max_in_flight == 4  # the window, and the one that is being pushed


def test_micro_batches_come_in_order_and_only_the_last_is_saved(tmp_path: Path) -> None:
    stages = CountingStages()
    run(stages, tmp_path, phases=constant(5, 8, grad_accum_steps=3))
    steps = [(request.step, request.micro_step) for request in stages.requests[:6]]
    assert steps == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(r.is_last_micro_step for r in stages.requests if r.checkpoint)
    assert stages.updates == 15


def test_a_stop_request_ends_with_a_checkpoint_of_where_the_run_stands(tmp_path: Path) -> None:
    stop, stages = StopRequest(), CountingStages()

    class Stopper(Recorder):
        def on_epoch(self, report: EpochReport) -> None:
            stop.reason = "SIGTERM"

    result = run(stages, tmp_path, Stopper(), stop)
    assert result.stopped == "SIGTERM"
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.step == result.step == stages.updates < 15

    resumed = CountingStages()
    assert run(resumed, tmp_path).step == 15
    assert resumed.restores == [result.step]
    assert resumed.updates == 15


def test_too_many_unreadable_images_stop_the_run_and_name_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = CountingStages()
    stages.bad = {1: (("a.jpg", "truncated"),), 2: (("a.jpg", "truncated"),), 3: (("b.jpg", "empty"),)}
    with pytest.raises(TooManyCorruptImagesError, match=r"2 images could not be read.*b\.jpg"):
        run(stages, tmp_path)
    assert sum("a.jpg" in text for text in caplog.messages) == 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(CountingStages(), tmp_path)
    caplog.set_level("INFO")
    stages = CountingStages()
    assert run(stages, tmp_path).step == 15
    assert stages.requests == []
    assert caplog.messages == ["checkpoint is already at the last step (15); nothing to train"]


def test_a_failure_after_a_stop_request_ends_the_run_at_the_last_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop, stages = StopRequest(), CountingStages({6: RuntimeError("out of luck")})

    class Stopper(Recorder):
        def on_checkpoint(self, step: int) -> None:
            stop.reason = "SIGTERM"

    result = run(stages, tmp_path, Stopper(), stop)
    assert (result.stopped, result.restarts) == ("SIGTERM", 0)
    assert caplog.messages[-1].endswith("stopping; last checkpoint: step 4")


def test_the_pipeline_is_drained_where_a_phase_ends_and_its_last_step_is_saved(tmp_path: Path) -> None:
    class Watched(CountingStages):
        def submit(self, request: StepRequest) -> Any:
            if request.step == 10 and request.micro_step == 0:
                assert self._in_flight == 0
            return super().submit(request)

    phases = phases_on([PhaseSpec(0, (8, 8), 8), PhaseSpec(2, (16, 16), 4, grad_accum_steps=2)], images=40)
    stages, recorder = Watched(), Recorder()
    run(stages, tmp_path, recorder, phases=phases, checkpoint_epochs=2.5)
    assert [r.grad_accum_steps for r in stages.requests] == [1] * 10 + [2] * 10
    assert recorder.checkpoints == [10, 15]
    assert [e.epoch for e in recorder.epochs] == [1, 2, 3]


def test_a_callback_that_has_seen_enough_ends_the_training_after_a_checkpoint(tmp_path: Path) -> None:
    class Satisfied(Recorder):
        def on_checkpoint(self, step: int) -> bool:
            super().on_checkpoint(step)
            return step == 8

    recorder = Satisfied()
    result = run(CountingStages(), tmp_path, recorder, window=0)
    assert (result.step, result.stopped) == (8, None)
    assert recorder.checkpoints == [4, 8]


def test_a_run_that_is_scored_has_a_checkpoint_at_the_end_of_those_epochs(tmp_path: Path) -> None:
    recorder = Recorder()
    run(CountingStages(), tmp_path, recorder, checkpoint_epochs=3, score_epochs=2)
    assert recorder.checkpoints == [10, 15]
    scored = schedule(epochs=4, score_epochs=2)
    assert [scored.scored_epoch(step) for step in (0, 5, 9, 10, 11, 20)] == [None, None, None, 2, None, None]
