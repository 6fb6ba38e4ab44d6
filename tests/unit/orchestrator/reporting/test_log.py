"""What is printed of the lines that modules log, and what `events.log` holds of them."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bim.orchestrator.reporting.log import ROOT, configure_console, line_prefix, log_to_file

log = logging.getLogger("bim.somewhere")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Handlers and level of the logger `bim` are put back."""
    handlers, level = list(ROOT.handlers), ROOT.level
    yield
    ROOT.handlers[:] = handlers
    ROOT.setLevel(level)


def log_one_of_each() -> None:
    log.debug("a detail")
    log.info("a line")
    log.warning("a warning")
    log.error("one cause\nanother cause")


@pytest.mark.parametrize(
    ("verbose", "quiet", "stdout"),
    [
        (False, False, "a line\na warning\n"),
        (True, False, "a detail\na line\na warning\n"),
        (False, True, "a warning\n"),
    ],
)
def test_lines_go_to_stdout_and_errors_to_stderr(
    capsys: pytest.CaptureFixture[str], verbose: bool, quiet: bool, stdout: str
) -> None:
    configure_console(verbose, quiet)
    log_one_of_each()
    assert capsys.readouterr() == (stdout, "error: one cause\nerror: another cause\n")


def test_every_line_goes_to_stderr_where_stdout_is_for_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_console(on_stderr=True)
    log_one_of_each()
    assert capsys.readouterr() == ("", "a line\na warning\nerror: one cause\nerror: another cause\n")


def test_a_file_has_the_details_that_the_console_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_console()
    with log_to_file(tmp_path / "events.log"):
        log.debug("a detail")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "events.log").read_text().endswith("  a detail\n")


def test_a_console_that_is_configured_again_prints_every_line_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_console(quiet=True)
    configure_console()
    log.info("a line")
    assert capsys.readouterr().out == "a line\n"


def test_lines_begin_with_the_prefix_of_their_thread(capsys: pytest.CaptureFixture[str]) -> None:
    configure_console()

    def train() -> None:
        with line_prefix("swin"), line_prefix("mae"):
            log.info("epoch 1\nepoch 2")

    with line_prefix("vit "):
        log.info("epoch 1")
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    with line_prefix(""):
        log.info("the end")
    assert capsys.readouterr().out.splitlines() == [
        *["vit   epoch 1", "swin  mae  epoch 1", "swin  mae  epoch 2", "the end"]
    ]


def test_a_file_has_the_same_lines_with_their_times_and_those_of_one_backbone_alone(tmp_path: Path) -> None:
    every, one = tmp_path / "events.log", tmp_path / "vit.log"
    every.write_text("an earlier process\n")
    with log_to_file(every), log_to_file(one, "vit"):
        with line_prefix("vit"):
            log.info("epoch 1")
        with line_prefix("swin"):
            log.info("epoch 1")
        log.info("measuring latency")
    log.info("nobody reads it")
    lines = every.read_text().splitlines()
    assert lines[0] == "an earlier process"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines[1:])
    assert [line[21:] for line in lines[1:]] == ["vit  epoch 1", "swin  epoch 1", "measuring latency"]
    assert [line[21:] for line in one.read_text().splitlines()] == ["epoch 1"]


def test_a_file_holds_the_error_that_ended_the_job(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    with pytest.raises(ValueError, match="is not finite"), log_to_file(path):
        raise ValueError("the loss is not finite")
    assert path.read_text().endswith("  error: the loss is not finite\n")


def test_a_disk_that_takes_nothing_ends_no_job(tmp_path: Path) -> None:
    with log_to_file(tmp_path / "missing" / "events.log"):
        log.info("a line")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_no_job(tmp_path: Path) -> None:
    (tmp_path / "events.log").symlink_to("/dev/full")
    with log_to_file(tmp_path / "events.log"):
        for _ in range(1000):
            log.info("a line that fills the buffer of the file")


def test_passwords_and_names_that_are_not_utf8_are_escaped_in_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_console()
    with log_to_file(tmp_path / "events.log"):
        log.info("reading %s from %s", b"caf\xe9".decode("utf-8", "surrogateescape"), "http://a:hunter2@b")
    for text in (capsys.readouterr().out, (tmp_path / "events.log").read_text()):
        assert r"reading caf\xe9 from http://***@b" in text
