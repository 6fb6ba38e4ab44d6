"""What a pause of the loop changes in the figures of an epoch: nothing."""

from __future__ import annotations

import pytest

from bim.orchestrator.data.phases import constant
from bim.orchestrator.training import meter as module
from bim.orchestrator.training.messages import StageReport, StepReport, StepRequest
from bim.orchestrator.training.meter import Meter
from bim.orchestrator.training.schedule import TrainingSchedule

SCHEDULE = TrainingSchedule(
    1, constant(4, 8), lambda step: 1e-3, window=4, checkpoint_epochs=1, max_bad_images=0
)


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def report(step: int, wait_s: float) -> StepReport:
    stages = tuple(StageReport({k: {"loss": 1.0}}, (), busy_s=1.0, idle_s=wait_s) for k in range(2))
    return StepReport(StepRequest(step, 1e-3), stages, (), load_s=0.1, data_wait_s=wait_s)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_pause_is_no_wait_for_data_whichever_report_it_falls_into(
    monkeypatch: pytest.MonkeyPatch, delay: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    meter = Meter(SCHEDULE)
    clock.now += 30
    meter.leave_out(30)
    for step in range(4):
        clock.now += 1
        meter.add(report(step, 29.5 if step == delay else 0.1))
    epoch = meter.epoch_report(3)
    assert epoch is not None
    assert epoch.data_wait == pytest.approx(0.3 / 4, abs=1e-6)
    means = meter.step_metrics(3)
    assert means is not None
    assert means["stage0/busy_share"] > 0.9


def test_a_long_wait_after_the_pause_was_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    meter = Meter(SCHEDULE)
    meter.leave_out(30)
    for step in range(4):
        clock.now += 30
        meter.add(report(step, 29.5))
    epoch = meter.epoch_report(3)
    assert epoch is not None
    assert epoch.data_wait > 0.7
