"""The loop over hand-made stages: when checkpoints are committed, and from which one it goes on."""

from __future__ import annotations

import errno
from pathlib import Path
from types import MethodType
from typing import Any

import pytest

from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import (
    TrainingError,
)
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.messages import SavedBlocks, StepRequest
from bim.orchestrator.training.stage_group import ShouldGiveUp
from tests.unit.orchestrator.training.stub_stages import CountingStages, Recorder, run


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
