from __future__ import annotations

import pytest

from bim.orchestrator.reporting.console import Progress, epoch_line
from bim.orchestrator.text import duration
from bim.orchestrator.training.callbacks import EpochReport


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (72, "1 min 12 s"),
        (3600 * 3 + 305, "3 h 05 min"),
        (86400 * 2 + 3600 * 4, "2 d 04 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_epoch_is_one_line_with_every_blocks_loss() -> None:
    report = EpochReport(3, 60, {1: 0.7, 0: 0.81}, 1234.4, 0.02, 72)
    assert epoch_line(report) == (
        "epoch  3/60  loss by block 0.810 0.700  1234 img/s  data wait 2%  to go 1 min 12 s"
    )


def test_waiting_for_plans_of_masks_is_told_where_it_costs_time() -> None:
    report = EpochReport(3, 60, {0: 0.81}, 1234.4, 0.02, 72, mask_wait=0.31)
    assert "data wait 2%  mask wait 31%  to go" in epoch_line(report)


class Sink:
    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.events: list[str] = []
        self.rewinds: list[tuple[int, str]] = []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics.append((step, values))

    def log_event(self, text: str) -> None:
        self.events.append(text)

    def rewind(self, step: int, prefix: str = "") -> None:
        self.rewinds.append((step, prefix))


def test_a_second_run_beside_the_first_has_its_own_names_and_rewinds_only_them() -> None:
    said: list[str] = []
    sink = Sink()
    progress = Progress(said.append, sink, "mae")
    progress.on_step(5, {"block0/loss": 1.0})
    progress.on_rewind(0)
    progress.say("stage 0 died")
    assert sink.metrics == [(5, {"mae/block0/loss": 1.0})]
    assert sink.rewinds == [(0, "mae/")]
    assert said == sink.events == ["mae  stage 0 died"]
