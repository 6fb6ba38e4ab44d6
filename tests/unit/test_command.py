"""The console command `bim`."""

from __future__ import annotations

import pytest

from bim.orchestrator.training.callbacks import StopRequest
from bim.pipelines.command import COMMANDS, main
from bim.pipelines.process import run_command


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["pretrian"]])
def test_no_command_and_an_unknown_one_are_bad_input(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert "usage: bim" in capsys.readouterr().err


def test_pretrain_is_the_main_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--mask.ration", "0.5"]) == 2
    assert "did you mean 'mask.ratio'?" in capsys.readouterr().err


def test_an_error_of_the_program_is_printed_without_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(stop: StopRequest) -> int:
        raise ZeroDivisionError("while asking postgresql://ada:hunter2@db/ml")

    assert run_command(fail) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):")
    assert told.rstrip().endswith("ZeroDivisionError: while asking postgresql://ada:***@db/ml")
