"""The loop over hand-made stages: order, window, marks, rewinds, stops. No torch, no Ray."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.phases import PhaseSpec, constant, phases_on
from bim.orchestrator.files import atomic_write
from bim.orchestrator.training.callbacks import EpochReport, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore, FileRecord, Manifest
from bim.orchestrator.training.errors import NonFiniteLoss, StageFailure
from bim.orchestrator.training.loop import PretrainResult, RunPlan, pretrain
from bim.orchestrator.training.messages import Order, StageReport, StepReport
from bim.orchestrator.training.restart_policy import RestartPolicy


class CountingStages:
    """Two stages whose whole state is the number of updates they made; fails where told, once each."""

    places = ((0,), (1,))

    def __init__(self, failures: dict[int, BaseException] | None = None) -> None:
        self.failures = dict(failures or {})
        self.updates = 0
        self.orders: list[Order] = []
        self.restores: list[int] = []
        self.most_under_way = 0
        self._under_way = 0
        self.bad: dict[int, tuple[tuple[str, str], ...]] = {}

    def start(self) -> None: ...

    def restore(self, checkpoint: Path | None, step: int) -> None:
        self.updates = 0 if checkpoint is None else int((checkpoint / "updates").read_text())
        self.restores.append(step)

    def submit(self, order: Order) -> Any:
        self._under_way += 1
        self.most_under_way = max(self.most_under_way, self._under_way)
        if order.step in self.failures:
            return StageFailure(
                "stage 1 (block 1)", f"at step {order.step}", self.failures.pop(order.step), died=False
            )
        self.orders.append(order)
        files: tuple[FileRecord, ...] = ()
        if order.last_micro:
            self.updates += 1
            if order.checkpoint:
                files = self.save(Path(order.checkpoint))
        report = StageReport({0: {"loss": 1.0 / (order.step + 1)}, 1: {"loss": 2.0}}, files, 0.01, 0.0)
        return StepReport(order, (report,), self.bad.get(order.step, ()), 0.0, 0.0)

    def settle(self, pending: Any) -> StepReport:
        self._under_way -= 1
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def abandon(self, pending: Sequence[Any]) -> None:
        self._under_way = 0

    def save(self, checkpoint: Path) -> tuple[FileRecord, ...]:
        checkpoint.mkdir(parents=True, exist_ok=True)
        atomic_write(checkpoint / "updates", str(self.updates))
        return (FileRecord("updates", len(str(self.updates)), zlib.crc32(str(self.updates).encode())),)

    def close(self) -> None: ...


class Ear:
    def __init__(self) -> None:
        self.said: list[str] = []
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

    def say(self, text: str) -> None:
        self.said.append(text)


def plan(**changes: Any) -> RunPlan:
    settings: dict[str, Any] = {
        "epochs": 3,
        "phases": constant(5, 8),
        "lr": lambda step: 0.1,
        "window": 4,
        "checkpoint_epochs": 4 / 5,
        "max_bad_images": 1,
    }
    return RunPlan(**(settings | changes))


def run(
    stages: CountingStages, out: Path, ear: Ear | None = None, stop: StopRequest | None = None, **changes: Any
) -> PretrainResult:
    ear = ear or Ear()
    store = CheckpointStore(out, say=ear.say)
    max_restarts = changes.pop("max_restarts", 3)
    return pretrain(
        plan(**changes),
        stages,
        store,
        lambda step: Manifest(step, 5, {}, {}, ()),
        ear,
        RestartPolicy(max_restarts),
        stop or StopRequest(),
    )


def test_every_step_is_submitted_once_in_order_and_the_end_is_saved(tmp_path: Path) -> None:
    stages, ear = CountingStages(), Ear()
    result = run(stages, tmp_path, ear)
    assert [o.step for o in stages.orders] == list(range(15))
    assert result.step == 15
    assert result.stopped is None
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.step == 15
    assert [e.epoch for e in ear.epochs] == [1, 2, 3]
    assert ear.epochs[0].losses == pytest.approx({0: (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5, 1: 2.0})


def test_no_more_than_the_window_is_under_way(tmp_path: Path) -> None:
    stages = CountingStages()
    run(stages, tmp_path, window=3)
    assert stages.most_under_way == 4  # the window, and the one that is being pushed


def test_micro_batches_come_in_order_and_only_the_last_is_marked(tmp_path: Path) -> None:
    stages = CountingStages()
    run(stages, tmp_path, phases=constant(5, 8, grad_accum_steps=3))
    assert [(o.step, o.micro) for o in stages.orders[:6]] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(o.last_micro for o in stages.orders if o.checkpoint)
    assert stages.updates == 15


@pytest.mark.parametrize("failing", [0, 3, 4, 5, 14])
def test_a_failed_step_rewinds_to_the_last_commit_and_is_said(tmp_path: Path, failing: int) -> None:
    stages, ear = CountingStages({failing: RuntimeError("out of luck")}), Ear()
    result = run(stages, tmp_path, ear)
    assert stages.updates == 15
    assert result.restarts == 1
    assert stages.restores == ear.rewinds == [0, failing // 4 * 4]
    assert any("out of luck" in text and "restart 1 of 3" in text for text in ear.said)


def test_when_restarts_are_used_up_the_user_sees_what_the_code_raised(tmp_path: Path) -> None:
    class Stubborn(CountingStages):
        def submit(self, order: Order) -> Any:
            if order.step == 6:
                return StageFailure("stage 0 (block 0)", "at step 6", KeyError("their own"), died=False)
            return super().submit(order)

    with pytest.raises(KeyError, match="their own"):
        run(Stubborn(), tmp_path, max_restarts=2)
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.step == 4


def test_a_loss_that_is_not_finite_ends_the_run_at_once(tmp_path: Path) -> None:
    stages = CountingStages({6: NonFiniteLoss("loss", 1, 6, 0.1)})
    with pytest.raises(NonFiniteLoss, match=r"loss of block 1 is not finite at step 6 \(learning rate 0.1\)"):
        run(stages, tmp_path)
    assert stages.restores == [0]


def test_a_stop_request_ends_with_a_checkpoint_of_where_the_run_stands(tmp_path: Path) -> None:
    stop, stages = StopRequest(), CountingStages()

    class Stopper(Ear):
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


def test_too_many_unreadable_images_stop_the_run_and_name_the_last(tmp_path: Path) -> None:
    stages, ear = CountingStages(), Ear()
    stages.bad = {1: (("a.jpg", "truncated"),), 2: (("a.jpg", "truncated"),), 3: (("b.jpg", "empty"),)}
    with pytest.raises(TooManyCorruptImagesError, match=r"2 images could not be read.*b\.jpg"):
        run(stages, tmp_path, ear)
    assert sum("a.jpg" in text for text in ear.said) == 1


def test_a_cut_short_checkpoint_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    run(CountingStages(), tmp_path)
    (tmp_path / "checkpoints" / "step-00000015" / "updates").write_text("1")
    ear, stages = Ear(), CountingStages()
    run(stages, tmp_path, ear)
    assert stages.restores == [12]
    assert any("step-00000015 is passed over: updates has 1 of 2 bytes" in text for text in ear.said)


def test_the_pipeline_is_drained_where_a_phase_ends_and_its_last_step_is_saved(tmp_path: Path) -> None:
    class Watched(CountingStages):
        def submit(self, order: Order) -> Any:
            if order.step == 10 and order.micro == 0:
                assert self._under_way == 0
            return super().submit(order)

    phases = phases_on([PhaseSpec(0, (8, 8), 8), PhaseSpec(2, (16, 16), 4, grad_accum_steps=2)], images=40)
    stages, ear = Watched(), Ear()
    run(stages, tmp_path, ear, phases=phases, checkpoint_epochs=2.5)
    assert [o.micros for o in stages.orders] == [1] * 10 + [2] * 10
    assert ear.checkpoints == [10, 15]
    assert [e.epoch for e in ear.epochs] == [1, 2, 3]


def test_a_checkpoint_is_told_once_it_is_whole(tmp_path: Path) -> None:
    class Looking(Ear):
        def on_checkpoint(self, step: int) -> None:
            latest = CheckpointStore(tmp_path).latest()
            assert latest is not None
            assert latest.step == step
            super().on_checkpoint(step)

    ear = Looking()
    run(CountingStages(), tmp_path, ear)
    assert ear.checkpoints == [4, 8, 12, 15]
