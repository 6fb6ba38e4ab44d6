"""Progress of a training: lines, the live display, and what the tracker receives."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import pytest
from rich.console import Console

from bim.orchestrator.reporting import console as module
from bim.orchestrator.reporting.console import Progress, epoch_line
from bim.orchestrator.training.callbacks import EpochReport

REPORT = EpochReport(3, 60, {1: 0.7, 0: 0.81}, 1234.4, 0.02, 72)


class Sink:
    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.rewinds: list[tuple[int, str]] = []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics.append((step, values))

    def rewind(self, step: int, prefix: str = "") -> None:
        self.rewinds.append((step, prefix))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 110 columns receives, which replaces the console."""
    output = io.StringIO()
    fake = Console(file=output, force_terminal=True, width=110, height=30, color_system=None, _environ={})
    monkeypatch.setattr(module, "console", lambda: fake)
    return output


def test_an_epoch_is_one_line_with_every_blocks_loss() -> None:
    assert epoch_line(REPORT) == (
        "epoch  3/60  loss by block 0.810 0.700  1234 img/s  data wait 2%  ETA 1 min 12 s"
    )


def test_a_long_line_has_the_first_and_the_last_loss_alone() -> None:
    losses = {block: 0.7 + block / 100 for block in range(24)}
    line = epoch_line(EpochReport(800, 800, losses, 98765.4, 0.22, 4000, mask_wait=0.31))
    assert "  loss 0.700 ... 0.930  " in line
    assert len(line) <= 100


def test_waiting_for_mask_plans_is_reported_if_it_costs_time() -> None:
    report = EpochReport(3, 60, {0: 0.81}, 1234.4, 0.02, 72, mask_wait=0.31)
    assert "data wait 2%  mask wait 31%  ETA" in epoch_line(report)


def test_a_slow_stage_is_named_on_the_line() -> None:
    report = replace(REPORT, slow_stage="stage 2 (block 2) 3.4 x")
    assert "data wait 2%  slow: stage 2 (block 2) 3.4 x  ETA" in epoch_line(report)


def test_a_second_training_has_its_own_names_and_rewinds_only_them() -> None:
    sink = Sink()
    progress = Progress(sink, "mae")
    progress.on_step(5, {"block0/loss": 1.0})
    progress.on_rewind(0)
    assert progress.started
    assert sink.metrics == [(5, {"mae/block0/loss": 1.0})]
    assert sink.rewinds == [(0, "mae/")]


def test_without_a_terminal_every_epoch_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(Sink()) as progress:
        progress.on_epoch(REPORT)
    assert caplog.messages == [epoch_line(REPORT)]
    assert not caplog.records[0].in_live_display  # type: ignore[attr-defined]


def test_a_terminal_shows_all_trainings_and_keeps_their_last_line(
    terminal: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Progress(Sink(), label="vit", total_steps=60) as vit, Progress(Sink(), label="swin") as swin:
        vit.on_step(3, {"block0/loss": 0.81, "block1/loss": 0.7, "images_per_s": 1234.4})
        assert vit.status() == "step 3/60  1234 img/s"
        vit.on_epoch(REPORT)
        swin.on_epoch(REPORT)
        assert vit.status().startswith("epoch 3/60  1234 img/s  data wait 2%  ETA 1 min 1")
        print("[0, 16] a line meanwhile")
    text = terminal.getvalue()
    assert "[0, 16] a line meanwhile\n" in text
    assert f"vit  {epoch_line(REPORT)}\n" in text
    assert f"swin  {epoch_line(REPORT)}\n" in text
    assert all(record.in_live_display for record in caplog.records)  # type: ignore[attr-defined]


def test_the_newest_scores_of_the_depths_stand_below_the_progress() -> None:
    progress, output = Progress(Sink(), total_steps=60), io.StringIO()
    progress.on_step(3, {"block0/loss": 0.81})
    progress.scores = "kNN top-1 by depth 41.0, 52.3 %"
    Console(file=output, width=100).print(*progress.rows(0, 100), sep="")
    assert [line.rstrip() for line in output.getvalue().splitlines()][1:] == [
        "  loss 0.810",
        "  kNN top-1 by depth 41.0, 52.3 %",
    ]


def test_less_than_ten_images_per_second_are_told_in_three_digits() -> None:
    assert "  0.413 img/s  " in epoch_line(replace(REPORT, images_per_s=0.4131))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_gives_the_terminal_back(terminal: io.StringIO, error: type[BaseException]) -> None:
    with pytest.raises(error), Progress(Sink()):
        raise error
    show_cursor, hide_cursor = "\x1b[?25h", "\x1b[?25l"
    assert terminal.getvalue().rfind(show_cursor) > terminal.getvalue().rfind(hide_cursor)


def test_a_quiet_console_has_no_live_display(terminal: io.StringIO) -> None:
    module.console().quiet = True
    with Progress(Sink()) as progress:
        progress.on_epoch(REPORT)
    assert terminal.getvalue() == ""
