"""The loop over hand-made stages that fail or hang: rewinds, restarts, the end."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import (
    DeviceMemoryError,
    NonFiniteLossError,
    StageFailure,
    TrainingError,
)
from bim.orchestrator.training.messages import StepReport, StepRequest
from bim.orchestrator.training.watchdog import Watchdog
from tests.unit.orchestrator.training.stub_stages import CountingStages, Recorder, run


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


def test_a_process_that_is_lost_too_often_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    class Lost(CountingStages):
        def submit(self, request: StepRequest) -> Any:
            return StageFailure(
                "stage 0 (block 0)", "at step 0", RuntimeError("out of memory"), process_lost=True
            )

    message = r"stage 0 \(block 0\) died at step 0: out of memory, after 2 restarts without a new checkpoint "
    with pytest.raises(TrainingError, match=message):
        run(Lost(), tmp_path, max_restarts=2)


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
    monkeypatch.setattr("bim.orchestrator.training.loop.SAVE_TIMEOUT_S", 0.0)
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
