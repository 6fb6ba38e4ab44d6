"""The loop over hand-made stages: order of steps, window, checkpoints, rewinds, stops."""

from __future__ import annotations

import errno
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import pytest

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.phases import PhaseSpec, constant, phases_on
from bim.orchestrator.files import atomic_write
from bim.orchestrator.training.callbacks import EpochReport, NullCallback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import (
    DeviceMemoryError,
    NonFiniteLossError,
    StageFailure,
    TrainingError,
)
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.manifest import FileRecord, Manifest
from bim.orchestrator.training.messages import SavedBlocks, StageReport, StepReport, StepRequest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.stage_group import ShouldGiveUp
from bim.orchestrator.training.watchdog import Watchdog


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
        self._written: tuple[tuple[str, tuple[FileRecord, ...]], ...] = ()
        self.bad: dict[int, tuple[tuple[str, str], ...]] = {}

    def start(self, should_give_up: ShouldGiveUp) -> None: ...

    def restore(self, checkpoint: Path | None, step: int, should_give_up: ShouldGiveUp) -> None:
        self._written = ()
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
                step=request.step,
            )
        self.requests.append(request)
        if request.is_last_micro_step:
            self.updates += 1
            if request.checkpoint:
                self.write(request.checkpoint)
        losses = {0: {"loss": 1.0 / (request.step + 1)}, 1: {"loss": 2.0}}
        saved = self.flush(lambda: False)
        reports = tuple(StageReport({k: losses[k]}, saved[k], 0.01, 0.0) for k in losses)
        return StepReport(request, reports, self.bad.get(request.step, ()), 0.0, 0.0)

    def wait(self, pending: Any, timeout_s: float) -> StepReport | None:
        self._in_flight -= 1
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def awaited(self, pending: Any) -> int:
        return 0

    def kill(self, component: int) -> None: ...

    def cancel_pending(self, pending: Sequence[Any], should_give_up: ShouldGiveUp) -> None:
        self._in_flight = 0

    def save(self, checkpoint: Path, should_give_up: ShouldGiveUp) -> None:
        self.write(str(checkpoint))

    def write(self, checkpoint: str) -> None:
        folder, text = Path(checkpoint), str(self.updates)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name in ("updates", "copy"):
            atomic_write(folder / name, text)
            files.append(FileRecord(name, len(text), zlib.crc32(text.encode())))
        self._written = (*self._written, (checkpoint, tuple(files)))

    def flush(self, should_give_up: ShouldGiveUp) -> tuple[tuple[SavedBlocks, ...], ...]:
        written, self._written = self._written, ()
        return tuple(
            tuple(SavedBlocks(folder, files[k : k + 1]) for folder, files in written) for k in (0, 1)
        )

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
    max_restarts, watchdog = changes.pop("max_restarts", 3), changes.pop("watchdog", None)
    return pretrain(
        schedule(**changes),
        stages,
        CheckpointStore(out),
        lambda step: Manifest(step, 5, {}, {}, ()),
        recorder or Recorder(),
        RestartPolicy(max_restarts, backoff_s=0.01),
        stop or StopRequest(),
        watchdog,
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

    message = r"stage 0 \(block 0\) died at step 0: out of memory, after 2 restarts without a new checkpoint "
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


def test_a_commit_beyond_the_failed_step_refills_the_restarts(tmp_path: Path) -> None:
    failures = {step: RuntimeError(f"number {step}") for step in (2, 5, 9, 13)}
    result = run(CountingStages(dict(failures)), tmp_path, max_restarts=1, window=0)
    assert (result.step, result.restarts) == (15, 4)


def test_failures_without_a_commit_between_them_use_the_restarts_up(tmp_path: Path) -> None:
    stages = CountingStages({5: KeyError("first"), 6: KeyError("second"), 7: KeyError("third")})
    with pytest.raises(KeyError, match="third"):
        run(stages, tmp_path, max_restarts=2, window=0)
    assert stages.restores == [0, 4, 4]


class Repeating(CountingStages):
    """Fails at step 6 every time, in the way that `failure` says."""

    def __init__(self, cause: BaseException, process_lost: bool) -> None:
        super().__init__()
        self.cause, self.process_lost = cause, process_lost

    def submit(self, request: StepRequest) -> Any:
        if request.step == 6:
            return StageFailure("stage 1 (block 1)", "at step 6", self.cause, self.process_lost, step=6)
        return super().submit(request)


def test_the_same_error_of_a_living_process_at_the_same_step_ends_the_run_at_once(tmp_path: Path) -> None:
    stages = Repeating(KeyError("again"), process_lost=False)
    with pytest.raises(KeyError, match="again"):
        run(stages, tmp_path, max_restarts=40)
    assert stages.restores == [0, 4]


def test_a_process_that_is_lost_at_the_same_step_uses_every_restart(tmp_path: Path) -> None:
    stages = Repeating(RuntimeError("killed"), process_lost=True)
    with pytest.raises(
        TrainingError, match=r"after 3 restarts without a new checkpoint .*; last checkpoint: step 4"
    ):
        run(stages, tmp_path, max_restarts=3)
    assert stages.restores == [0, 4, 4, 4]


def test_device_memory_that_is_full_twice_ends_with_its_sentence(tmp_path: Path) -> None:
    stages = Repeating(DeviceMemoryError("the device memory of block 1 is full"), process_lost=False)
    message = r"stage 1 \(block 1\) failed at step 6: the device memory of block 1 is full, twice; last checkpoint: step 4"
    with pytest.raises(TrainingError, match=message):
        run(stages, tmp_path)
    assert stages.restores == [0, 4]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_ends_the_run_at_once_with_the_path_and_the_last_checkpoint(
    tmp_path: Path, number: int
) -> None:
    error = OSError(number, os.strerror(number), "/data/block-1.safetensors")
    stages = CountingStages({6: error})
    message = rf"^/data/block-1.safetensors: {os.strerror(number)}; .*; last checkpoint: step 4$"
    with pytest.raises(TrainingError, match=message):
        run(stages, tmp_path)
    assert stages.restores == [0]


def test_a_full_disk_met_by_the_commit_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = CheckpointStore.commit

    def full(store: CheckpointStore, manifest: Manifest) -> Path:
        if manifest.step == 8:
            raise OSError(errno.ENOSPC, "No space left on device", "manifest.json")
        return commit(store, manifest)

    monkeypatch.setattr(CheckpointStore, "commit", full)
    stages = CountingStages()
    with pytest.raises(TrainingError, match=r"manifest.json: No space left .*; last checkpoint: step 4"):
        run(stages, tmp_path)
    assert stages.restores == [0]


def test_the_whole_story_of_a_failure_is_logged_for_debugging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    stages = CountingStages()
    failures = [
        StageFailure(
            "stage 0 (block 0)", "at step 3", RuntimeError("x"), True, 3, "line one\nthe worker's log"
        )
    ]

    class Once(CountingStages):
        def submit(self, request: StepRequest) -> Any:
            return failures.pop() if request.step == 3 and failures else super().submit(request)

    stages = Once()
    run(stages, tmp_path)
    (record,) = [record for record in caplog.records if record.levelname == "DEBUG"]
    assert record.getMessage() == "stage 0 (block 0) died at step 3: x\nline one\nthe worker's log"


class Hanging(CountingStages):
    """Stage 1 does not answer at step 6 until it is killed."""

    def __init__(self, forever: bool = False) -> None:
        super().__init__()
        self.hangs, self.forever, self.killed = True, forever, list[int]()

    def wait(self, pending: Any, timeout_s: float) -> StepReport | None:
        hung = isinstance(pending, StepReport) and pending.request.step == 6 and self.hangs
        return None if hung else super().wait(pending, timeout_s)

    def awaited(self, pending: Any) -> int:
        return 1

    def kill(self, component: int) -> None:
        self.killed.append(component)
        self.hangs = self.forever


def ticking(seconds: float) -> Watchdog:
    """A watchdog whose clock advances with every look."""
    ticks = itertools.count()
    return Watchdog(clock=lambda: next(ticks) * seconds)


def test_a_hung_stage_is_killed_and_the_run_rewound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stages = Hanging()
    result = run(stages, tmp_path, watchdog=ticking(5))
    assert stages.killed == [1]
    assert (result.step, result.restarts, stages.updates) == (15, 1, 15)
    assert stages.restores == [0, 4]
    message = "stage 1 (block 1) died (hung) at step 6: no answer for 1805 s; it usually needs 0.01 s"
    assert any(text.startswith(message) for text in caplog.messages)


def test_a_stop_request_is_obeyed_while_a_stage_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bim.orchestrator.training.loop.STOP_SAVE_S", 0.0)
    stop, stages = StopRequest(), Hanging(forever=True)

    class Stopping(Hanging):
        def awaited(self, pending: Any) -> int:
            stop.reason = "SIGTERM"
            return 1

    stages = Stopping(forever=True)
    result = run(stages, tmp_path, stop=stop, watchdog=ticking(0.1))
    assert result.stopped == "SIGTERM"
    assert stages.killed == []
    assert caplog.messages[-1] == "stopping without a new checkpoint; last checkpoint: step 4"


class SlowDisk(CountingStages):
    """What a step saves is on the disk, and reported, `lag` steps later, or when it is waited for."""

    lag = 3

    def submit(self, request: StepRequest) -> Any:
        self.now = request.step
        return super().submit(request)

    def write(self, checkpoint: str) -> None:
        super().write(checkpoint)
        self.written_at = self.now + self.lag

    def flush(self, should_give_up: ShouldGiveUp | None = None) -> tuple[tuple[SavedBlocks, ...], ...]:
        in_step = should_give_up is not None and not isinstance(should_give_up, MethodType)
        if in_step and self._written and self.now < self.written_at:
            return ((), ())
        return super().flush(should_give_up or (lambda: False))


def test_a_checkpoint_is_committed_once_all_stages_have_written_it(tmp_path: Path) -> None:
    stages, recorder = SlowDisk(), Recorder()
    run(stages, tmp_path, recorder, window=1)
    assert recorder.checkpoints == [4, 8, 12, 15]
    assert stages.restores == [0]


def test_a_failure_before_a_checkpoint_is_written_goes_back_to_the_one_before(tmp_path: Path) -> None:
    stages = SlowDisk({9: RuntimeError("out of luck")})
    result = run(stages, tmp_path, window=1)
    assert stages.restores == [0, 4]
    assert (result.step, stages.updates) == (15, 15)


def test_unreadable_images_of_a_later_step_are_not_in_a_checkpoint(tmp_path: Path) -> None:
    stages = SlowDisk()
    stages.bad = {5: (("a.jpg", "truncated"),)}
    facts: dict[int, Any] = {}

    class Reading(Recorder):
        def on_checkpoint(self, step: int) -> None:
            manifest = CheckpointStore(tmp_path).latest()
            assert manifest is not None
            facts[step] = manifest.facts["bad_images"]

    run(stages, tmp_path, Reading(), window=1)
    assert facts == {4: {}, 8: {"a.jpg": "truncated"}, 12: {"a.jpg": "truncated"}, 15: {"a.jpg": "truncated"}}


def test_a_requested_checkpoint_is_saved_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stop, recorder = StopRequest(), Recorder()

    class Asking(CountingStages):
        def submit(self, request: StepRequest) -> Any:
            stop.saves_requested += request.step == 5
            return super().submit(request)

    result = run(Asking(), tmp_path, recorder, stop)
    assert result.step == 15
    assert recorder.checkpoints == [4, 7, 8, 12, 15]
    assert caplog.messages.count("checkpoint saved after step 7 of 15") == 1
