"""Lines of an evaluation that takes long, in this process and in another one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bim.orchestrator.jobs import measuring
from bim.orchestrator.jobs.measuring import MeasuringLines, ProgressFile


def test_a_line_is_logged_now_and_then_and_a_stop_is_looked_at_every_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, checks = [0.0], [0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])

    def check() -> None:
        checks[0] += 1

    lines = MeasuringLines(check)
    with caplog.at_level(logging.INFO, "bim"):
        for second in range(26):
            now[0] = float(second)
            lines(f"{second} of 26 images")
    assert caplog.messages == ["measuring 10 of 26 images", "measuring 20 of 26 images"]
    assert checks == [26]


def test_progress_passes_through_a_file_that_is_gone_afterward(tmp_path: Path) -> None:
    writer, reader = ProgressFile(tmp_path), ProgressFile(tmp_path)
    assert reader.read() == ""
    writer.write("64 of 359 images")
    writer.write("128 of 359 images")  # within the same second
    assert reader.read() == "64 of 359 images"
    reader.remove()
    reader.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_nothing_ends_no_evaluation(tmp_path: Path) -> None:
    ProgressFile(tmp_path / "missing").write("64 of 359 images")
