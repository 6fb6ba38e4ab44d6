"""The loop over hand-made stages: order of steps, window, checkpoints, rewinds, stops."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.phases import PhaseSpec, constant, phases_on
from bim.orchestrator.files import atomic_write
from bim.orchestrator.training.callbacks import EpochReport, NullCallback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import NonFiniteLossError, StageFailure, TrainingError
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.manifest import FileRecord, Manifest
from bim.orchestrator.training.messages import StageReport, StepReport, StepRequest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule


class CountingStages:
    """Two stages whose state is the number of their updates; each step in `failures` fails once."""

    stage_blocks = ((0,), (1,))

    def __init__(self, failures: dict[int, BaseException] | None = None) -> None:
        self.failures = dict(failures or {})
        self.updates = 0
        self.requests: list[StepRequest] = []
        self.restores: list[int] = []
        self.max_in_flight = 0
        self._in_flight = 0
        self.bad: dict[int, tuple[tuple[str, str], ...]] = {}

    def start(self) -> None: ...

    def restore(self, checkpoint: Path | None, step: int) -> None:
        self.updates = 0 if checkpoint is None else int((checkpoint / "updates").read_text())
        self.restores.append(step)

    def submit(self, request: StepRequest) -> Any:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        if request.step in self.failures:
            return StageFailure(
                "stage 1 (block 1)",
                f"at step {request.step}",
                self.failures.pop(request.step),
                process_lost=False,
            )
        self.requests.append(request)
        files: tuple[FileRecord, ...] = ()
        if request.is_last_micro_step:
            self.updates += 1
            if request.checkpoint:
                files = self.save(Path(request.checkpoint))
        report = StageReport({0: {"loss": 1.0 / (request.step + 1)}, 1: {"loss": 2.0}}, files, 0.01, 0.0)
        return StepReport(request, (report,), self.bad.get(request.step, ()), 0.0, 0.0)

    def wait(self, pending: Any) -> StepReport:
        self._in_flight -= 1
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def cancel_pending(self, pending: Sequence[Any]) -> None:
        self._in_flight = 0

    def save(self, checkpoint: Path) -> tuple[FileRecord, ...]:
        checkpoint.mkdir(parents=True, exist_ok=True)
        atomic_write(checkpoint / "updates", str(self.updates))
        return (FileRecord("updates", len(str(self.updates)), zlib.crc32(str(self.updates).encode())),)

    def close(self) -> None: ...


class Recorder(NullCallback):
    def __init__(self) -> None:
        self.epochs: list[EpochReport] = []
        self.steps: list[int] = []
        self.rewinds: list[int] = []
        self.checkpoints: list[int] = []

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)

    def on_checkpoint(self, step: int) -> None:
        self.checkpoints.append(step)

    def on_rewind(self, step: int) -> None:
        self.rewinds.append(step)


def schedule(**changes: Any) -> TrainingSchedule:
    settings: dict[str, Any] = {
        "epochs": 3,
        "phases": constant(5, 8),
        "lr": lambda step: 0.1,
        "window": 4,
        "checkpoint_epochs": 4 / 5,
        "max_bad_images": 1,
    }
    return TrainingSchedule(**(settings | changes))


def run(
    stages: CountingStages,
    out: Path,
    recorder: Recorder | None = None,
    stop: StopRequest | None = None,
    **changes: Any,
) -> PretrainResult:
    max_restarts = changes.pop("max_restarts", 3)
    return pretrain(
        schedule(**changes),
        stages,
        CheckpointStore(out),
        lambda step: Manifest(step, 5, {}, {}, ()),
        recorder or Recorder(),
        RestartPolicy(max_restarts),
        stop or StopRequest(),
    )


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


@pytest.mark.parametrize("failing", [0, 3, 4, 5, 14])
def test_a_failed_step_rewinds_to_the_last_commit_and_is_logged(
    tmp_path: Path, failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    stages, recorder = CountingStages({failing: RuntimeError("out of luck")}), Recorder()
    result = run(stages, tmp_path, recorder)
    assert stages.updates == 15
    assert result.restarts == 1
    assert stages.restores == recorder.rewinds == [0, failing // 4 * 4]
    assert any("out of luck" in text and "restart 1 of 3" in text for text in caplog.messages)


def test_when_restarts_are_used_up_the_user_sees_what_the_code_raised(tmp_path: Path) -> None:
    class Stubborn(CountingStages):
        def submit(self, request: StepRequest) -> Any:
            if request.step == 6:
                return StageFailure(
                    "stage 0 (block 0)", "at step 6", KeyError("their own"), process_lost=False
                )
            return super().submit(request)

    with pytest.raises(KeyError, match="their own"):
        run(Stubborn(), tmp_path, max_restarts=2)
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.step == 4


def test_a_loss_that_is_not_finite_ends_the_run_at_once(tmp_path: Path) -> None:
    stages = CountingStages({6: NonFiniteLossError("loss", 1, 6, 0.1)})
    with pytest.raises(
        NonFiniteLossError, match=r"loss of block 1 is not finite at step 6 \(learning rate 0.1\)"
    ):
        run(stages, tmp_path)
    assert stages.restores == [0]


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


def test_an_incomplete_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(CountingStages(), tmp_path)
    (tmp_path / "checkpoints" / "step-00000015" / "updates").write_text("1")
    stages = CountingStages()
    run(stages, tmp_path)
    assert stages.restores == [12]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["checkpoint step-00000015 skipped: updates has 1 of 2 bytes"]


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


def test_a_process_that_is_lost_too_often_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    class Lost(CountingStages):
        def submit(self, request: StepRequest) -> Any:
            return StageFailure(
                "stage 0 (block 0)", "at step 0", RuntimeError("out of memory"), process_lost=True
            )

    message = r"stage 0 \(block 0\) died at step 0: out of memory, after 2 restarts \(failures.max_restarts\)"
    with pytest.raises(TrainingError, match=message):
        run(Lost(), tmp_path, max_restarts=2)


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


def test_a_checkpoint_is_reported_once_it_is_valid(tmp_path: Path) -> None:
    class Looking(Recorder):
        def on_checkpoint(self, step: int) -> None:
            latest = CheckpointStore(tmp_path).latest()
            assert latest is not None
            assert latest.step == step
            super().on_checkpoint(step)

    recorder = Looking()
    run(CountingStages(), tmp_path, recorder)
    assert recorder.checkpoints == [4, 8, 12, 15]


def test_a_run_whose_checkpoints_vanish_does_not_begin_again_when_it_is_rewound(tmp_path: Path) -> None:
    stages = CountingStages({6: RuntimeError("out of luck")})

    class Removing(Recorder):
        def on_checkpoint(self, step: int) -> None:
            shutil.rmtree(tmp_path / "checkpoints")

    with pytest.raises(
        TrainingError, match="no checkpoint left to go on from: that of step 4 is gone or damaged"
    ):
        run(stages, tmp_path, Removing())
    assert stages.restores == [0]
